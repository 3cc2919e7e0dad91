"""A conversion goes block by block, and what it writes is what loading straight onto a mesh gives."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax.checkpoint import Box, LazyArray, load_model, streaming
from exitax.checkpoint.lazy import block_shape, boxes
from exitax.convert import from_huggingface, load_huggingface, open_source
from exitax.convert.reading import lazy_params
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from tests.convert.conftest import WHY, MakeFn

torch = pytest.importorskip('torch', reason=WHY)

RULES = ShardingRules()


@pytest.mark.parametrize('max_bytes', [1, 500, 3000, 1 << 20])
@pytest.mark.parametrize('name', ['llama_biases', 'qwen3_biases'])
def test_any_block_of_a_leaf_is_what_the_whole_leaf_has_there(
  name: str, max_bytes: int, make_folder: MakeFn
) -> None:
  source = open_source(make_folder(name))
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  whole = load_huggingface(source, mesh=mesh, rules=RULES).params
  told: list[int] = []
  lazy = lazy_params(source.config, source.tensors, report=told.append)

  def check(leaf: LazyArray, array: jax.Array) -> None:
    block = block_shape(leaf.shape, itemsize=leaf.dtype.itemsize, max_bytes=max_bytes)
    # Single elements of all leaves would take minutes.
    places = list(boxes(leaf.shape, block=block))[:: 1 if max_bytes > 1 else 97]
    for box in places:
      out = np.empty([part.stop - part.start for part in box], leaf.dtype)
      leaf.read(box, out)
      np.testing.assert_array_equal(out, np.asarray(array)[box])

  jax.tree.map(check, lazy, whole)
  if max_bytes > 1:
    assert sum(told) == sum(leaf.nbytes for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
  'config', [MeshConfig(data=1), MeshConfig(data=2, tensor=2), MeshConfig(data=8)]
)
def test_a_streamed_conversion_equals_a_model_that_was_loaded(
  config: MeshConfig,
  dtype: torch.dtype,
  make_folder: MakeFn,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(streaming, 'BLOCK_BYTES', 2000)
  source = open_source(make_folder('qwen3_biases', dtype=dtype, shard='20KB'))
  size = int(np.prod(list(config.sizes.values())))
  mesh = make_mesh(config, jax.devices()[:size])
  expected = load_huggingface(source, mesh=mesh, rules=RULES)
  from_huggingface(source, tmp_path / 'model')
  found = load_model(tmp_path / 'model', mesh=mesh, rules=RULES)

  def check(path: object, left: jax.Array, right: jax.Array) -> None:
    assert left.dtype == right.dtype == jnp.dtype(str(dtype).removeprefix('torch.')), path
    assert left.sharding == right.sharding, path
    assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), path

  jax.tree.map_with_path(check, found.params, expected.params)


def test_no_block_is_larger_than_it_may_be_and_no_parameter_is_held(
  make_folder: MakeFn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Counted where leaves are read: the largest tensor here is several times a block."""
  monkeypatch.setattr(streaming, 'BLOCK_BYTES', 2000)
  asked: list[tuple[int, int]] = []
  plain = LazyArray.__init__

  def counting(self: LazyArray, *, shape: tuple[int, ...], dtype: np.dtype, read: object) -> None:
    def counted(box: Box, out: np.ndarray) -> None:
      asked.append((out.ctypes.data, out.nbytes))
      read(box, out)  # type: ignore[operator]

    plain(self, shape=shape, dtype=dtype, read=counted)

  monkeypatch.setattr(LazyArray, '__init__', counting)
  source = open_source(make_folder('llama'))
  from_huggingface(source, tmp_path / 'model')
  assert sum(size for _, size in asked) == source.num_bytes
  assert max(size for _, size in asked) <= 2000 < max(e.num_bytes for e in source.tensors.values())
  assert len({place for place, _ in asked}) <= streaming.MAX_THREADS + 1
