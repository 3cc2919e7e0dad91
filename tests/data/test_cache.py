from __future__ import annotations

import os
from pathlib import Path

import pytest

from exitax.data.cache import cache_root, cached_folder, is_whole, key_of
from exitax.errors import UserError


class Writer:
  def __init__(self) -> None:
    self.calls = 0

  def __call__(self, folder: Path) -> None:
    self.calls += 1
    (folder / 'a.bin').write_bytes(b'content')


def test_made_once(tmp_path):
  writer = Writer()
  for _ in range(3):
    path = cached_folder(tmp_path / 'deep' / 'key', write_fn=writer)
    assert (path / 'a.bin').read_bytes() == b'content'
  assert writer.calls == 1
  assert os.listdir(tmp_path / 'deep') == ['key']


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove', 'manifest'])
def test_damaged_entry_is_made_anew(tmp_path, damage):
  writer = Writer()
  path = cached_folder(tmp_path / 'key', write_fn=writer)
  if damage == 'flip':
    (path / 'a.bin').write_bytes(b'contenu')
  elif damage == 'truncate':
    (path / 'a.bin').write_bytes(b'cont')
  elif damage == 'remove':
    (path / 'a.bin').unlink()
  else:
    (path / 'manifest.json').write_text('{"a.bin": ')
  assert not is_whole(path)
  cached_folder(path, write_fn=writer)
  assert writer.calls == 2
  assert (path / 'a.bin').read_bytes() == b'content'


def test_failure_leaves_nothing(tmp_path):
  def fail(folder: Path) -> None:
    (folder / 'half').write_text('x')
    raise RuntimeError('stop')

  with pytest.raises(RuntimeError, match='stop'):
    cached_folder(tmp_path / 'key', write_fn=fail)
  assert os.listdir(tmp_path) == []


def test_another_process_may_be_faster(tmp_path):
  writer = Writer()

  def slow(folder: Path) -> None:
    cached_folder(tmp_path / 'key', write_fn=writer)
    writer(folder)

  path = cached_folder(tmp_path / 'key', write_fn=slow)
  assert is_whole(path) and os.listdir(tmp_path) == ['key']


def test_cache_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write the cache .*EXITAX_CACHE_DIR'):
    cached_folder(tmp_path / 'file' / 'key', write_fn=Writer())


def test_root_from_argument_environment_and_home(monkeypatch):
  monkeypatch.setenv('EXITAX_CACHE_DIR', '/somewhere')
  assert cache_root('/given') == Path('/given')
  assert cache_root() == Path('/somewhere')
  monkeypatch.delenv('EXITAX_CACHE_DIR')
  monkeypatch.setenv('HOME', '/home/someone')
  assert cache_root() == Path('/home/someone/.cache/exitax')


def test_key_follows_values_not_order():
  assert key_of({'a': 1, 'b': [2]}) == key_of({'b': [2], 'a': 1})
  assert key_of({'a': 1}) != key_of({'a': 2})
