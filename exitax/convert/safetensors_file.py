"""Safetensors files: every tensor a view into mapped memory, and a writer that streams.

The format is eight bytes (little-endian length of the header), a JSON header of names with dtype,
shape and offsets, then the bytes. The `safetensors` library gives NumPy no bfloat16 and wants all
tensors of a file in memory to write it; the tests hold both directions to it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from exitax.errors import UserError

# The formats that weights come in; others (8-bit floats, integers) need a meaning that is not here.
DTYPES: Mapping[str, np.dtype] = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
# No header of a real checkpoint comes near it; a corrupted length does.
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
  """A tensor in a file.

  Attributes:
    file: where it is.
    dtype: its name in the format, such as 'BF16'.
    shape: its sizes.
    start: first byte in the file.
    num_bytes: its length.
  """

  file: Path
  dtype: str
  shape: tuple[int, ...]
  start: int
  num_bytes: int

  def read(self) -> np.ndarray:
    """The tensor as a read-only view of the file: nothing is copied, pages come as they are used.

    Raises:
      UserError: a format that weights cannot have here.
    """
    if self.dtype not in DTYPES:
      raise UserError(
        f'{self.file} has a tensor of dtype {self.dtype}: {", ".join(DTYPES)} are read '
        '(quantised checkpoints are not: take the original weights)'
      )
    if not self.num_bytes:
      return np.zeros(self.shape, DTYPES[self.dtype])
    return np.memmap(
      self.file, DTYPES[self.dtype], mode='r', offset=self.start, shape=self.shape, order='C'
    )


def read_header(path: Path) -> dict[str, TensorEntry]:
  """The tensors of a file by name.

  Raises:
    UserError: it is no safetensors file, or shorter than its header says.
  """
  size = path.stat().st_size
  header, first = _read_json(path, size)
  try:
    entries = dict(_entries(path, header, first=first))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path} has no readable safetensors header ({error}): fetch it again'
    ) from None
  end = max((entry.start + entry.num_bytes for entry in entries.values()), default=0)
  if end > size:
    raise UserError(
      f'{path} is cut off: its header promises {end} bytes, there are {size}: fetch it again'
    )
  return entries


def read_metadata(path: Path) -> dict[str, str]:
  """The file's own strings by name. Raises UserError as `read_header` does."""
  header, _ = _read_json(path, path.stat().st_size)
  return dict(header.get('__metadata__') or {})


def write_file(
  path: Path,
  tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[np.ndarray]]],
  *,
  metadata: Mapping[str, str],
) -> None:
  """Writes a file tensor by tensor, piece by piece, and puts it on disk.

  Args:
    path: where to.
    tensors: name, dtype in the format, shape, and the tensor's pieces in C order, which may be made
      as they are asked for.
    metadata: of the file; transformers wants `{'format': 'pt'}`.

  Raises:
    OSError: the disk is full, or the folder cannot be written.
    ValueError: pieces that do not add up to the shape.
  """
  tensors = list(tensors)
  header: dict[str, Any] = {'__metadata__': dict(metadata)}
  offset = 0
  for name, dtype, shape, _ in tensors:
    end = offset + math.prod(shape) * DTYPES[dtype].itemsize
    header[name] = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [offset, end]}
    offset = end
  encoded = json.dumps(header, separators=(',', ':')).encode()
  encoded += b' ' * (-len(encoded) % _ALIGNMENT)
  with open(path, 'xb') as file:
    file.write(len(encoded).to_bytes(8, 'little') + encoded)
    for name, dtype, shape, pieces in tensors:
      written = 0
      for piece in pieces:
        if piece.dtype != DTYPES[dtype]:
          raise ValueError(f'{name}: a piece is {piece.dtype}, the file says {dtype}')
        written += file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
      if written != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f'{name}: {written} bytes for shape {list(shape)} of {dtype}')
    file.flush()
    os.fsync(file.fileno())


def dtype_name(dtype: Any) -> str:
  """The format's name of a dtype.

  Raises:
    UserError: weights cannot have it.
  """
  name = _NAMES.get(np.dtype(dtype))
  if name is None:
    raise UserError(f'weights of {np.dtype(dtype)} cannot be written: choose float32 or bfloat16')
  return name


def _read_json(path: Path, size: int) -> tuple[dict[str, Any], int]:
  """The header, and the first byte behind it."""
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
      raise UserError(
        f'{path} is not a whole safetensors file ({size} bytes, a header of {length}): fetch it again'
      )
    try:
      header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
      raise UserError(
        f'{path} has no readable safetensors header ({error}): fetch it again'
      ) from None
  if not isinstance(header, dict):
    raise UserError(f'{path} has no readable safetensors header (no object): fetch it again')
  return header, 8 + length


def _entries(path: Path, header: Any, *, first: int) -> Iterator[tuple[str, TensorEntry]]:
  for name, item in header.items():
    if name == '__metadata__':
      continue
    start, end = item['data_offsets']
    shape = tuple(int(n) for n in item['shape'])
    dtype, itemsize = item['dtype'], None
    if dtype in DTYPES:
      itemsize = DTYPES[dtype].itemsize
      if end - start != math.prod(shape) * itemsize or start < 0:
        raise ValueError(f'{name} of {list(shape)} {dtype} has {end - start} bytes')
    yield (
      name,
      TensorEntry(file=path, dtype=dtype, shape=shape, start=first + start, num_bytes=end - start),
    )
