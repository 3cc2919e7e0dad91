"""States that are written block by block: the same checkpoint, few blocks in memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from exitax.checkpoint import Box, CheckpointError, CheckpointManager, LazyArray, streaming
from exitax.checkpoint.manifest import MANIFEST_NAME

# Of a block in these tests: leaves fall into many blocks, some of them not full.
BLOCK_BYTES = 300


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(streaming, 'BLOCK_BYTES', BLOCK_BYTES)


def arrays() -> dict[str, Any]:
  rng = np.random.default_rng(0)
  return {
    'blocks': {
      'kernel': rng.normal(size=(4, 8, 16)).astype(jnp.bfloat16),
      'scale': rng.normal(size=(5, 7)).astype(np.float32),
    },
    'embed': rng.normal(size=(64, 8)).astype(np.float32),
    'zeros': np.zeros((16, 16), np.float32),
    'empty': np.zeros((0, 3), np.float32),
    'count': np.int32(7),
  }


def lazy(array: np.ndarray) -> LazyArray:
  def read(box: Box, out: np.ndarray) -> None:
    out[...] = array[box]

  return LazyArray(shape=np.shape(array), dtype=np.dtype(array.dtype), read=read)


def abstract(state: Any, *, mesh: Mesh | None = None) -> Any:
  def leaf(array: np.ndarray) -> jax.ShapeDtypeStruct:
    axes = [
      name if size % 2 == 0 and size else None
      for size, name in zip(array.shape, ('data', None, 'tensor'), strict=False)
    ]
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  return jax.tree.map(leaf, state)


def assert_same(found: Any, expected: Any) -> None:
  def check(path: Any, left: Any, right: Any) -> None:
    assert left.dtype == right.dtype, path
    assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), path

  jax.tree.map_with_path(check, found, expected)


@pytest.mark.parametrize('of', ['lazy', 'numpy', 'jax', 'sharded'])
def test_a_streamed_state_is_the_one_that_save_writes(of: str, tmp_path: Path) -> None:
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), devices=jax.devices()[:4])
  state = {'params': arrays(), 'step': np.int32(3)}
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(state, mesh=mesh))
  given = {
    'lazy': lambda: jax.tree.map(lazy, state),
    'numpy': lambda: state,
    'jax': lambda: jax.tree.map(jnp.asarray, state),
    'sharded': lambda: jax.tree.map(jax.device_put, state, shardings),
  }[of]()
  with (
    CheckpointManager(tmp_path / 'saved') as saved,
    CheckpointManager(tmp_path / 'streamed') as streamed,
  ):
    saved.save(1, state, extras={'position': 4})
    streamed.save_streamed(1, given, extras={'position': 4})
    assert streamed.info(1) == saved.info(1)
    streamed.verify(1)
    for place in (None, mesh):
      found = streamed.restore(abstract(state, mesh=place)).state
      assert_same(found, saved.restore(abstract(state, mesh=place)).state)
      assert_same(found, state)
    assert_same(streamed.restore_params(abstract(state['params'])).state, state['params'])


def test_every_element_is_asked_for_once_and_few_blocks_are_there(tmp_path: Path) -> None:
  array = np.arange(64 * 30, dtype=np.float32).reshape(64, 30)
  asked, places, sizes = np.zeros(array.shape, np.int32), set(), set()
  lock = threading.Lock()

  def read(box: Box, out: np.ndarray) -> None:
    out[...] = array[box]
    with lock:
      asked[box] += 1
      places.add(out.ctypes.data)
      sizes.add(out.nbytes)

  leaf = LazyArray(shape=array.shape, dtype=array.dtype, read=read)
  with CheckpointManager(tmp_path) as manager:
    manager.save_streamed(0, {'params': {'x': leaf}})
    assert_same(manager.restore(abstract({'params': {'x': array}})).state['params']['x'], array)
  assert (asked == 1).all()
  assert max(sizes) <= BLOCK_BYTES
  # 32 blocks in the memory of one for each thread that writes.
  assert len(places) <= streaming.MAX_THREADS + 1


def test_blocks_are_files_under_the_manifest(tmp_path: Path) -> None:
  with CheckpointManager(tmp_path) as manager:
    manager.save_streamed(0, {'params': jax.tree.map(lazy, arrays())})
    blocks = sorted((tmp_path / '0').glob('arrays/params.tree/embed/c/*/*'))
    assert len(blocks) == 8
    content = bytearray(blocks[3].read_bytes())
    content[5] ^= 1
    blocks[3].write_bytes(content)
    with pytest.raises(CheckpointError, match=r'params\.tree/embed/c/3/0 has sha256'):
      manager.restore(abstract({'params': arrays()}))


@pytest.mark.parametrize('error', [OSError('the disk is gone'), KeyboardInterrupt()])
def test_a_failure_on_the_way_leaves_the_step_unfinished(
  error: BaseException, tmp_path: Path
) -> None:
  state = {'params': arrays()}
  calls = []

  def read(box: Box, out: np.ndarray) -> None:
    calls.append(box)
    if len(calls) == 5:
      raise error
    out[...] = 0

  leaf = LazyArray(shape=(4000, 64), dtype=np.dtype(np.float32), read=read)
  expected = CheckpointError if isinstance(error, Exception) else KeyboardInterrupt
  with CheckpointManager(tmp_path) as manager:
    manager.save_streamed(1, state)
    with pytest.raises(expected):
      manager.save_streamed(2, {'params': {'x': leaf}})
    # What was waiting is not written any more.
    assert len(calls) < 100
    assert not (tmp_path / '2' / MANIFEST_NAME).exists()
    assert manager.steps() == [1]
    assert_same(manager.restore(abstract(state)).state, state)
    manager.save_streamed(2, state)
    assert manager.steps() == [1, 2]
