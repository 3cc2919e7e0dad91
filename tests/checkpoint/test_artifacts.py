"""Small files: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exitax import checkpoint
from exitax.errors import UserError


def test_json_comes_back(tmp_path: Path) -> None:
  value = {'exits': [2, 4], 'name': 'Größe', 'rate': 0.1, 'none': None}
  path = tmp_path / 'new' / 'model.json'
  checkpoint.write_json_atomic(path, value)
  assert checkpoint.read_json(path) == value
  assert [entry.name for entry in path.parent.iterdir()] == ['model.json']


def test_a_failed_write_leaves_the_old_file(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = tmp_path / 'model.json'
  checkpoint.write_json_atomic(path, {'version': 1})
  with pytest.raises(TypeError):
    checkpoint.write_json_atomic(path, {'version': object()})

  def full(descriptor: int) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space left'):
    checkpoint.write_json_atomic(path, {'version': 2})
  assert checkpoint.read_json(path) == {'version': 1}
  assert [entry.name for entry in tmp_path.iterdir()] == ['model.json']


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
  (tmp_path / 'usual').write_bytes(b'')
  checkpoint.write_bytes_atomic(tmp_path / 'atomic', b'')
  assert (tmp_path / 'atomic').stat().st_mode == (tmp_path / 'usual').stat().st_mode


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'does not exist'),
    (b'{"a": ', 'not valid JSON'),
    (b'\xff\xfe', 'not valid JSON'),
    (b'[' * 100_000, 'not valid JSON'),
  ],
)
def test_unreadable_json_is_the_users_error(
  tmp_path: Path, content: bytes | None, message: str
) -> None:
  path = tmp_path / 'model.json'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=message):
    checkpoint.read_json(path)


def test_a_folder_in_place_of_a_file_is_the_users_error(tmp_path: Path) -> None:
  with pytest.raises(UserError, match='cannot be read'):
    checkpoint.read_json(tmp_path)


def test_checkpoints_lie_in_their_own_folder(tmp_path: Path) -> None:
  assert checkpoint.checkpoints_directory(tmp_path) == tmp_path / 'checkpoints'
