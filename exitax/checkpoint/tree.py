"""State trees as plain nested dicts of named leaves, and how two of them differ.

Containers (flax.struct dataclasses, optax named tuples, lists) are turned into dicts by path, so a
checkpoint does not depend on the Python classes that wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

SEPARATOR = '/'
# Mismatches named in one message; the rest are counted.
MAX_NAMED = 4


@dataclasses.dataclass(frozen=True)
class LeafSpec:
  """Shape and dtype of a leaf; dtype by name, typed PRNG keys as 'key<fry>' and the like."""

  shape: tuple[int, ...]
  dtype: str

  def __str__(self) -> str:
    return f'[{",".join(map(str, self.shape))}] {self.dtype}'


def named_leaves(tree: Any) -> dict[str, Any]:
  """Leaves by path such as 'params/blocks/mlp/kernel', in the tree's own order.

  None and empty containers have no leaves and so no entry.

  Raises:
    ValueError: two leaves have the same path, a name contains '/', or the tree is a single leaf.
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    names = [_entry_name(entry) for entry in path]
    if not names or any(SEPARATOR in name or not name for name in names):
      raise ValueError(f'the leaf at {names} needs a non-empty path of names without "{SEPARATOR}"')
    joined = SEPARATOR.join(names)
    if joined in leaves:
      raise ValueError(f'two leaves of the state have the path {joined}')
    leaves[joined] = leaf
  return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts out of leaves by path: {'a/b': 1} -> {'a': {'b': 1}}."""
  root: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *folders, name = path.split(SEPARATOR)
    node = root
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = leaf
  return root


def leaf_specs(leaves: Mapping[str, Any]) -> dict[str, LeafSpec]:
  """Specs of arrays or of abstract arrays, by path."""
  return {
    path: LeafSpec(shape=tuple(leaf.shape), dtype=str(leaf.dtype)) for path, leaf in leaves.items()
  }


def as_saveable(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves that no later step can change: device arrays stay, everything else becomes NumPy.

  On CPU the "device" arrays live in host memory and would be written from there without a copy;
  they are copied here, because the caller's next step overwrites its donated buffers in place.

  Raises:
    ValueError: a leaf is not an array or number, or has 64 bits where JAX would keep 32 of them.
  """
  saveable: dict[str, Any] = {}
  for path, leaf in leaves.items():
    if isinstance(leaf, jax.Array):
      on_cpu = next(iter(leaf.devices())).platform == 'cpu'
      saveable[path] = jax.numpy.copy(leaf) if on_cpu else leaf
    else:
      saveable[path] = _as_numpy(leaf, path=path)
  return saveable


def differences(saved: Mapping[str, LeafSpec], *, wanted: Mapping[str, LeafSpec]) -> list[str]:
  """One phrase for every leaf in which a checkpoint and a configuration differ."""
  phrases = []
  for path in _in_order(wanted, saved):
    old, new = saved.get(path), wanted.get(path)
    if old is None:
      phrases.append(f'{path} is missing in the checkpoint, {new} in the configuration')
    elif new is None:
      phrases.append(f'{path} is {old} in the checkpoint, missing in the configuration')
    elif old.shape != new.shape:
      phrases.append(
        f'{path} is {list(old.shape)} in the checkpoint, {list(new.shape)} in the configuration'
      )
    elif old.dtype != new.dtype:
      phrases.append(f'{path} is {old.dtype} in the checkpoint, {new.dtype} in the configuration')
  return phrases


def summarize(phrases: list[str]) -> str:
  """The first few phrases and the number of the others."""
  rest = len(phrases) - MAX_NAMED
  return '; '.join(phrases[:MAX_NAMED]) + (f'; and {rest} more' if rest > 0 else '')


def _in_order(first: Iterable[str], second: Iterable[str]) -> list[str]:
  return list(dict.fromkeys([*first, *second]))


def _entry_name(entry: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  raise ValueError(f'the state has a container whose children have no names: {entry!r}')


def _as_numpy(leaf: Any, *, path: str) -> np.ndarray:
  if not isinstance(leaf, (np.ndarray, np.generic, bool, int, float)):
    raise ValueError(f'{path} is a {type(leaf).__name__}: a state holds arrays and numbers only')
  array = np.array(leaf)
  canonical = jax.dtypes.canonicalize_dtype(array.dtype)
  narrowed = array.astype(canonical)
  if array.dtype != canonical and array.dtype.kind in 'iu' and not np.array_equal(narrowed, array):
    raise ValueError(f'{path} does not fit {canonical}: keep large numbers in the extras')
  return narrowed
