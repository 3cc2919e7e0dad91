from __future__ import annotations

import pytest

from exitax.data.files import find_files, read_text, walk
from exitax.errors import UserError


def _names(paths, folder):
  return [path.relative_to(folder).as_posix() for path in paths]


def test_order_is_by_relative_path_and_each_file_comes_once(tmp_path):
  for name in ('b/x.txt', 'a.txt', 'b.txt', 'b/.git/y.txt', 'skip/z.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  found = walk(tmp_path, skip=frozenset({'skip'}))
  assert _names(found, tmp_path) == ['a.txt', 'b.txt', 'b/x.txt']
  twice = find_files([str(tmp_path / 'b.txt'), str(tmp_path), str(tmp_path / '*.txt')])
  assert _names(twice, tmp_path) == ['b.txt', 'a.txt', 'b/x.txt', 'skip/z.txt']


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('x')
  assert find_files(['~/a.txt']) == [tmp_path / 'a.txt']


def test_file_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match=r'cannot read .*: Is a directory'):
    read_text(tmp_path)
