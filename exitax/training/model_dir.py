"""The model directory at the start of a run: written by one process, seen by all."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import jax

from exitax.checkpoint import read_model, write_model
from exitax.data import Tokenizer
from exitax.errors import UserError
from exitax.models import ModelConfig
from exitax.parallel import do_together

# A network file system may take this long to show what another host has written.
SEEN_WITHIN_SECONDS = 60.0


def prepare_model_dir(model_dir: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
  """Process 0 writes `model.json` and the tokenizer or checks what is there; the others see it.

  Raises:
    UserError: the directory holds another model; or a process does not see what process 0 wrote.
  """

  def write() -> None:
    if jax.process_index() == 0:
      write_model(model_dir, config, tokenizer)

  def see() -> None:
    if jax.process_index():
      _await_model(model_dir, tokenizer)

  do_together(write, part='writing the model directory')
  do_together(see, part='reading the model directory')


def _await_model(model_dir: Path, tokenizer: Tokenizer) -> None:
  deadline = time.monotonic() + SEEN_WITHIN_SECONDS
  while True:
    try:
      seen = read_model(model_dir)[1].digest
    except UserError:
      seen = None
    if seen == tokenizer.digest:
      return
    if time.monotonic() > deadline:
      raise UserError(
        f'process {jax.process_index()} ({socket.gethostname()}) does not see in {model_dir} what '
        'process 0 wrote there: MODEL_DIR must be one folder of a file system that all hosts share'
      )
    time.sleep(0.5)
