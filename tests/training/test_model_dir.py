"""The model directory as a process sees it that did not write it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType

import pytest

from exitax import checkpoint, data
from exitax.errors import UserError
from exitax.training import model_dir


def test_a_directory_that_is_not_shared_is_named(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(model_dir, 'SEEN_WITHIN_SECONDS', 0.1)
  with pytest.raises(
    UserError, match=r'does not see in .*: MODEL_DIR must be one folder of a file'
  ):
    model_dir._await_model(tmp_path, data.ByteTokenizer())


def test_what_is_seen_late_is_waited_for(tiny: ModuleType, tmp_path: Path) -> None:
  tokenizer = data.ByteTokenizer()
  writer = threading.Timer(0.3, checkpoint.write_model, (tmp_path, tiny.MODEL, tokenizer))
  writer.start()
  model_dir._await_model(tmp_path, tokenizer)
  assert checkpoint.read_model(tmp_path)[0] == tiny.MODEL
  writer.join()


def test_one_process_writes_and_does_not_wait(tiny: ModuleType, tmp_path: Path) -> None:
  model_dir.prepare_model_dir(tmp_path, tiny.MODEL, data.ByteTokenizer())
  assert checkpoint.read_model(tmp_path)[0] == tiny.MODEL
