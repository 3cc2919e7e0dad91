"""Hashes against hashlib's one-shot function."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from exitax.checkpoint import digest


@pytest.mark.parametrize(
  'size', [0, 1, digest.CHUNK_BYTES - 1, digest.CHUNK_BYTES, 2 * digest.CHUNK_BYTES + 7]
)
def test_hash_of_any_size_equals_the_one_shot_hash(tmp_path: Path, size: int) -> None:
  content = np.random.default_rng(size).bytes(size)
  (tmp_path / 'file').write_bytes(content)
  expected = digest.FileRecord(size=size, sha256=hashlib.sha256(content).hexdigest())
  assert digest.hash_file(tmp_path / 'file') == expected


def test_many_files_keep_their_names(tmp_path: Path) -> None:
  names = [f'{index % 3}/{index}' for index in range(20)]
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  assert digest.list_files(tmp_path) == sorted(names)
  records = digest.hash_files(tmp_path, names=names)
  assert list(records) == names
  for name, record in records.items():
    assert record.sha256 == hashlib.sha256(name.encode()).hexdigest()
  with pytest.raises(FileNotFoundError):
    digest.hash_files(tmp_path, names=['absent'])
