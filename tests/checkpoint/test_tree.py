"""States as named leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax.checkpoint import tree
from exitax.checkpoint.tree import LeafSpec


@flax.struct.dataclass
class Box:
  """A container with a named child."""

  inside: Any


class Pair(NamedTuple):
  """A container as optax makes them."""

  first: Any
  second: Any


def test_paths_do_not_depend_on_the_containers() -> None:
  one = {'a': Box(inside=Pair(first=1, second=[2, None, (3,)])), 'empty': {}}
  assert tree.named_leaves(one) == {'a/inside/first': 1, 'a/inside/second/0': 2} | {
    'a/inside/second/2/0': 3
  }
  other = {'a': {'inside': {'first': 1, 'second': {'0': 2, '2': {'0': 3}}}}}
  assert tree.named_leaves(one) == tree.named_leaves(other)
  assert tree.nest(tree.named_leaves(one)) == other


@pytest.mark.parametrize('bad', [{'a/b': 1}, {'': 1}, 1.0])
def test_leaves_need_plain_names(bad: Any) -> None:
  with pytest.raises(ValueError, match='non-empty path'):
    tree.named_leaves(bad)


def test_numbers_become_what_jax_would_make_of_them() -> None:
  values = {'i': 3, 'f': 0.1, 'b': True, 'n': np.arange(3), 's': np.float64(2)}
  for path, leaf in tree.as_saveable(values).items():
    expected = jnp.asarray(values[path])
    assert leaf.dtype == expected.dtype
    np.testing.assert_array_equal(leaf, expected)


def test_host_arrays_are_copied() -> None:
  source = np.zeros(3, np.float32)
  saveable = tree.as_saveable({'w': source})
  source += 1
  np.testing.assert_array_equal(saveable['w'], np.zeros(3))


@pytest.mark.parametrize(('leaf', 'message'), [('text', 'a is a str'), (2**40, 'does not fit')])
def test_leaves_that_could_not_come_back_are_refused(leaf: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    tree.as_saveable({'a': leaf})


def test_differences_name_every_kind() -> None:
  saved = {
    'same': LeafSpec((2,), 'float32'),
    'shape': LeafSpec((8, 64, 128), 'float32'),
    'dtype': LeafSpec((2,), 'float32'),
    'old': LeafSpec((), 'int32'),
  }
  wanted = {
    'same': LeafSpec((2,), 'float32'),
    'shape': LeafSpec((6, 64, 128), 'bfloat16'),
    'dtype': LeafSpec((2,), 'bfloat16'),
    'new': LeafSpec((3, 4), 'key<fry>'),
  }
  assert tree.differences(saved, wanted=wanted) == [
    'shape is [8, 64, 128] in the checkpoint, [6, 64, 128] in the configuration',
    'dtype is float32 in the checkpoint, bfloat16 in the configuration',
    'new is missing in the checkpoint, [3,4] key<fry> in the configuration',
    'old is [] int32 in the checkpoint, missing in the configuration',
  ]


def test_specs_of_arrays_and_of_abstract_arrays_agree() -> None:
  leaves = {'w': jnp.zeros((2, 3), jnp.bfloat16), 'key': jax.random.key(0)}
  assert tree.leaf_specs(leaves) == tree.leaf_specs(jax.eval_shape(lambda: leaves))
  assert tree.leaf_specs(leaves)['key'] == LeafSpec((), 'key<fry>')
