"""SIGKILL at any moment of a save leaves every finished step as it was."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from exitax import checkpoint

NUM_VALUES = 1 << 18

# Saves without end; argv: directory, slow or fast hashing, the same step or new ones.
PROGRAM = f"""
import itertools, sys, time
import numpy as np
from exitax import checkpoint
from exitax.checkpoint import digest

directory, hashing, steps = sys.argv[1:]
if hashing == 'slow':
  hash_file = digest.hash_file

  def slow(path):
    time.sleep(0.02)
    return hash_file(path)

  digest.hash_file = slow

config = checkpoint.CheckpointConfig(keep_latest=2, keep_best=0)
with checkpoint.CheckpointManager(directory, config=config) as manager:
  for count in itertools.count(1):
    step = count if steps == 'new' else 1
    state = {{'params': {{'w': np.full({NUM_VALUES}, step, np.float32)}}, 'step': np.int32(step)}}
    manager.save(step, state, extras={{'position': step}})
    if count > 1:
      print(step, flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Writer:
  """A program that saves to a directory."""

  process: subprocess.Popen[str]
  directory: Path
  steps: str


def _start(directory: Path, *, hashing: str, steps: str, env: dict[str, str]) -> Writer:
  command = [sys.executable, '-c', PROGRAM, str(directory), hashing, steps]
  process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
  return Writer(process=process, directory=directory, steps=steps)


def _kill(writer: Writer, *, delay: float) -> None:
  assert writer.process.stdout is not None
  # A line says that one step at least is committed and another is on its way.
  assert writer.process.stdout.readline().strip()
  time.sleep(delay)
  assert writer.process.poll() is None
  os.kill(writer.process.pid, signal.SIGKILL)
  writer.process.wait()
  writer.process.stdout.close()


def _check(manager: checkpoint.CheckpointManager, *, step: int) -> None:
  abstract = {
    'params': {'w': jax.ShapeDtypeStruct((NUM_VALUES,), np.float32)},
    'step': jax.ShapeDtypeStruct((), np.int32),
  }
  restored = manager.restore(abstract, step=step)
  assert restored.extras == {'position': step}
  assert int(restored.state['step']) == step
  np.testing.assert_array_equal(
    restored.state['params']['w'], np.full(NUM_VALUES, step, np.float32)
  )


@pytest.mark.processes
def test_kill_in_the_middle_of_saves(tmp_path: Path, subprocess_env: dict[str, str]) -> None:
  kinds = [('slow', 'new'), ('fast', 'new'), ('slow', 'same'), ('fast', 'same')]
  writers = [
    _start(tmp_path / f'{hashing}-{steps}', hashing=hashing, steps=steps, env=subprocess_env)
    for hashing, steps in kinds
  ]
  try:
    for writer in writers:
      _kill(writer, delay=random.uniform(0.0, 0.3))
  finally:
    for writer in writers:
      writer.process.kill()
  for writer in writers:
    config = checkpoint.CheckpointConfig(keep_latest=3)
    manager = checkpoint.CheckpointManager(writer.directory, config=config)
    steps = manager.steps()
    assert steps
    for step in steps:
      _check(manager, step=step)
    # The lock of the dead writer is gone, so the step it was busy with can be written anew.
    again = steps[-1] + (writer.steps == 'new')
    state = {'params': {'w': np.full(NUM_VALUES, again, np.float32)}, 'step': np.int32(again)}
    with manager:
      manager.save(again, state, extras={'position': again})
    _check(manager, step=again)
    names = {path.name for path in writer.directory.iterdir()}
    assert names == {str(step) for step in manager.steps()}
