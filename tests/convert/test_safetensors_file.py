"""The file format, held to the safetensors library in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitax.convert import dtype_name, read_header, write_file
from exitax.errors import UserError
from tests.convert.conftest import WHY

torch_files = pytest.importorskip('safetensors.torch', reason=WHY)
torch = pytest.importorskip('torch', reason=WHY)

TORCH = {
  'F64': torch.float64,
  'F32': torch.float32,
  'F16': torch.float16,
  'BF16': torch.bfloat16,
}


def as_numpy(tensor: Any) -> np.ndarray:
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


@pytest.mark.parametrize('dtype', TORCH)
def test_reads_what_the_library_writes(dtype: str, tmp_path: Path) -> None:
  tensors = {
    'a.weight': torch.randn(5, 7).to(TORCH[dtype]),
    'scalar': torch.randn(()).to(TORCH[dtype]),
    'none': torch.zeros(0, 3).to(TORCH[dtype]),
  }
  torch_files.save_file(tensors, tmp_path / 'x.safetensors')
  entries = read_header(tmp_path / 'x.safetensors')
  assert entries.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert entries[name].dtype == dtype
    view = entries[name].read()
    assert np.array_equal(view, as_numpy(tensor))
    assert not view.flags.writeable or not view.size


@given(
  shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
  dtype=st.sampled_from(sorted(TORCH)),
  rows=st.integers(1, 4),
)
def test_the_library_reads_what_is_written(
  shapes: list[tuple[int, ...]], dtype: str, rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
  path = tmp_path_factory.mktemp('files') / 'x.safetensors'
  rng = np.random.default_rng(0)
  arrays = {
    f't{i}': as_numpy(torch.asarray(rng.standard_normal(shape)).to(TORCH[dtype]))
    for i, shape in enumerate(shapes)
  }

  def pieces(array: np.ndarray) -> list[np.ndarray]:
    if not array.ndim:
      return [array]
    return [array[i : i + rows] for i in range(0, array.shape[0], rows)]

  write_file(
    path,
    [(name, dtype, array.shape, pieces(array)) for name, array in arrays.items()],
    metadata={'format': 'pt'},
  )
  found = torch_files.load_file(path)
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert np.array_equal(as_numpy(found[name]), array)
  with torch_files.safe_open(path, 'pt') as file:
    assert file.metadata() == {'format': 'pt'}


def test_pieces_that_do_not_add_up_are_a_fault(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match='bytes for shape'):
    piece = np.zeros((1, 3), np.float32)
    write_file(tmp_path / 'x', [('a', 'F32', (2, 3), [piece])], metadata={})
  with pytest.raises(ValueError, match='the file says F32'):
    piece = np.zeros((2, 3), np.float64)
    write_file(tmp_path / 'y', [('a', 'F32', (2, 3), [piece])], metadata={})


def header(content: object) -> bytes:
  raw = json.dumps(content).encode()
  return len(raw).to_bytes(8, 'little') + raw


DAMAGE = {
  'empty': (b'', 'not a whole safetensors file'),
  'length beyond the file': ((1 << 40).to_bytes(8, 'little') + b'{}', 'not a whole safetensors'),
  'no JSON': ((2).to_bytes(8, 'little') + b'{[', 'no readable safetensors header'),
  'a list': (header([]), 'no readable safetensors header'),
  'no offsets': (header({'a': {'dtype': 'F32', 'shape': [1]}}), 'data_offsets'),
  'sizes that differ': (
    header({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}}) + b'\0' * 4,
    'has 4 bytes',
  ),
  'cut off': (
    header({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}) + b'\0' * 7,
    'is cut off: its header promises',
  ),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
  content, message = DAMAGE[name]
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    read_header(path)
  assert str(path) in str(error.value)


def test_formats_without_a_meaning_are_refused(tmp_path: Path) -> None:
  path = tmp_path / 'x.safetensors'
  torch_files.save_file({'a': torch.zeros(3, dtype=torch.int8)}, path)
  with pytest.raises(UserError, match='dtype I8'):
    read_header(path)['a'].read()
  with pytest.raises(UserError, match='weights of int32'):
    dtype_name(np.int32)
