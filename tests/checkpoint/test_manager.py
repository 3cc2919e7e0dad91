"""Saving and restoring through the manager."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from exitax import checkpoint
from exitax.checkpoint import commit


@flax.struct.dataclass
class State:
  """A stand-in for a training state."""

  step: jax.Array
  params: Any
  opt_state: Any
  key: jax.Array


def _params(seed: int, *, width: int = 8) -> dict[str, Any]:
  # NumPy's generator, because every jax operation outside jit compiles once per shape.
  rng = np.random.default_rng(seed)
  return {
    'embed': {'table': jnp.asarray(rng.normal(size=(16, width)), jnp.float32)},
    'blocks': {'mlp': {'kernel': jnp.asarray(rng.normal(size=(4, width, 16)), jnp.bfloat16)}},
    'exits': {'2': {'bias': jnp.asarray(rng.normal(size=width), jnp.float32)}},
  }


def _state(seed: int) -> State:
  params = _params(seed)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1)))

  @jax.jit
  def first_update(params: Any) -> Any:
    return optimizer.update(params, optimizer.init(params), params)[1]

  return State(
    step=jnp.int32(seed),
    params=params,
    opt_state=first_update(params),
    key=jax.random.key(seed + 100),
  )


def _small_state(seed: int) -> State:
  return State(step=jnp.int32(seed), params=_params(seed), opt_state=(), key=jax.random.key(seed))


def _bits(leaf: Any) -> np.ndarray:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  array = np.array(leaf)
  return np.frombuffer(array.tobytes(), np.uint8)


def _assert_same(actual: Any, expected: Any) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert isinstance(left, jax.Array)
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    np.testing.assert_array_equal(_bits(left), _bits(right))


def _abstract(state: Any) -> Any:
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
  )


def _mesh(data: int, tensor: int) -> Mesh:
  devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
  return Mesh(devices, ('data', 'tensor'))


def _manager(path: Path, **config: Any) -> checkpoint.CheckpointManager:
  return checkpoint.CheckpointManager(path, config=checkpoint.CheckpointConfig(**config))


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
  state = _state(3)
  extras = {'data': {'position': 17, 'seed': [1, 2]}, 'tokenizer': 'ab12'}
  with _manager(tmp_path) as manager:
    manager.save(30, state, extras=extras, metrics={'loss': 1.5})
  restored = _manager(tmp_path).restore(_abstract(state))
  _assert_same(restored.state, state)
  assert restored.step == 30
  assert restored.extras == extras
  assert restored.info.metrics == {'loss': 1.5}
  assert restored.info.leaves['key'].dtype == 'key<fry>'


def test_numbers_and_numpy_come_back_as_device_arrays(tmp_path: Path) -> None:
  state = {
    'metrics': {'count': 7, 'flags': np.array([True, False])},
    'wide': np.arange(3),
    'nan': jnp.array([math.nan, -0.0]),
    'empty': jnp.zeros((0, 4)),
    'keys': jax.random.split(jax.random.key(1, impl='rbg'), 3),
    'none': None,
  }
  with _manager(tmp_path) as manager:
    manager.save(0, state)
    restored = manager.restore(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state)), step=0)
  _assert_same(restored.state, jax.tree.map(jnp.asarray, state))


def test_restores_onto_another_mesh(tmp_path: Path) -> None:
  state = _small_state(1)

  def place(mesh: Mesh, spec: PartitionSpec) -> Any:
    def leaf_sharding(leaf: jax.Array) -> NamedSharding:
      return NamedSharding(mesh, spec if leaf.ndim >= 2 else PartitionSpec())

    return jax.tree.map(leaf_sharding, state)

  sharded = jax.device_put(state, place(_mesh(4, 2), PartitionSpec('data', 'tensor')))
  with _manager(tmp_path) as manager:
    manager.save(1, sharded)
  for mesh, spec in [
    (_mesh(2, 4), PartitionSpec('data', 'tensor')),
    (_mesh(1, 2), PartitionSpec(None, 'tensor')),
    (_mesh(8, 1), PartitionSpec(None, 'data')),
  ]:
    shardings = place(mesh, spec)
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      state,
      shardings,
    )
    restored = _manager(tmp_path).restore(abstract).state
    _assert_same(restored, state)
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_buffers_may_be_donated_right_after_save(tmp_path: Path) -> None:
  spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
  mesh = _mesh(4, 2)
  shape = (512, 1024)
  source = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  with _manager(tmp_path) as manager:
    for step, spec in enumerate([PartitionSpec('data', 'tensor'), PartitionSpec()]):
      sharding = NamedSharding(mesh, spec)
      # A jitted copy: device_put may alias the NumPy buffer, which could not be donated.
      state = jax.jit(lambda leaf: leaf + 0, out_shardings=sharding)(source)
      state = {'params': {'kernel': state}}
      manager.save(step, state)
      spoiled = state
      for _ in range(3):
        spoiled = spoil(spoiled)
      jax.block_until_ready(spoiled)
      assert state['params']['kernel'].is_deleted(), 'the copy for the save must not pin buffers'
      restored_sharding = NamedSharding(mesh, PartitionSpec())
      abstract = jax.ShapeDtypeStruct(shape, np.float32, sharding=restored_sharding)
      manager.wait()
      restored = manager.restore({'params': {'kernel': abstract}}, step=step)
      np.testing.assert_array_equal(restored.state['params']['kernel'], source)


def test_save_returns_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  gate = threading.Event()
  write_manifest = commit.write_manifest

  def slow(plan: commit.CommitPlan) -> None:
    assert gate.wait(timeout=30)
    write_manifest(plan)

  monkeypatch.setattr(commit, 'write_manifest', slow)
  with _manager(tmp_path) as manager:
    extras = {'position': 1}
    manager.save(1, {'params': _params(1)}, extras=extras)
    extras['position'] = 2
    assert manager.latest_step() is None
    gate.set()
    manager.wait()
    assert manager.latest_step() == 1
    assert manager.info().extras == {'position': 1}


def test_parameters_alone_do_not_need_the_optimizer_files(tmp_path: Path) -> None:
  state = _small_state(5).replace(opt_state=({'mu': jnp.zeros(3)},))
  with _manager(tmp_path) as manager:
    manager.save(5, state)
  for path in (tmp_path / '5' / 'arrays' / 'opt_state.tree').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  manager = _manager(tmp_path)
  _assert_same(manager.restore_params(_abstract(state.params)).state, state.params)
  blocks = manager.restore_subtree(_abstract(state.params['blocks']), prefix='params/blocks')
  _assert_same(blocks.state, state.params['blocks'])
  with pytest.raises(checkpoint.CheckpointError, match=r'opt_state\.tree'):
    manager.restore(_abstract(state))


def test_keeps_latest_and_best(tmp_path: Path) -> None:
  losses = {10: 3.0, 20: 1.0, 30: math.nan, 40: 2.0, 50: 4.0, 60: 5.0}
  with _manager(tmp_path, keep_latest=2, keep_best=2) as manager:
    for step, loss in losses.items():
      manager.save(step, {'params': {'w': jnp.full(4, step)}}, metrics={'loss': loss})
    manager.wait()
    assert manager.steps() == [20, 40, 50, 60]
    assert manager.latest_step() == 60
    assert manager.best_step() == 20
    restored = manager.restore_params({'w': jax.ShapeDtypeStruct((4,), jnp.int32)}, step=20)
    np.testing.assert_array_equal(restored.state['w'], np.full(4, 20))


def test_the_step_just_saved_is_kept_though_later_ones_exist(tmp_path: Path) -> None:
  with _manager(tmp_path, keep_latest=1, keep_best=0) as manager:
    manager.save(40, {'w': jnp.zeros(2)})
    manager.save(20, {'w': jnp.zeros(2)})
    manager.wait()
    assert manager.steps() == [20, 40]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
  with _manager(tmp_path) as manager:
    for value in (1, 2):
      manager.save(7, {'w': jnp.full(3, value)})
    manager.wait()
    restored = manager.restore({'w': jax.ShapeDtypeStruct((3,), jnp.int32)})
  np.testing.assert_array_equal(restored.state['w'], np.full(3, 2))
  assert [path.name for path in tmp_path.iterdir()] == ['7']


@pytest.mark.parametrize('method', ['wait', 'save', 'close'])
def test_a_failed_save_surfaces_and_leaves_the_older_step(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
  manager = _manager(tmp_path)
  state = {'w': jnp.arange(3)}
  manager.save(1, state)
  manager.wait()

  def full(plan: commit.CommitPlan) -> None:
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(commit, 'write_manifest', full)
    manager.save(2, state)
    with pytest.raises(checkpoint.CheckpointError, match=r'No space left.*step 1 is untouched'):
      if method == 'save':
        manager.save(3, state)
      else:
        getattr(manager, method)()
  assert manager.steps() == [1]
  manager.save(4, state)
  manager.close()
  assert manager.steps() == [1, 4]
  assert not (tmp_path / '2').exists(), 'the next successful save removes the remains'


def test_another_error_is_not_masked_by_a_failed_save(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  def broken(plan: commit.CommitPlan) -> None:
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(commit, 'write_manifest', broken)
  with pytest.raises(KeyError, match='mine'), _manager(tmp_path) as manager:
    manager.save(1, {'w': jnp.zeros(2)})
    raise KeyError('mine')
  assert 'Input/output error' in caplog.text


def test_a_save_that_waits_for_a_lost_process_does_not_hold_an_error_up(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  waiting, lost = threading.Event(), threading.Event()

  def wait_for_all(plan: commit.CommitPlan) -> None:
    waiting.set()
    lost.wait(60)

  monkeypatch.setattr(commit, 'write_manifest', wait_for_all)
  monkeypatch.setattr('exitax.checkpoint.manager._PATIENCE_SECONDS', 0.1)
  manager = checkpoint.CheckpointManager(tmp_path)
  with pytest.raises(KeyError), manager:
    manager.save(1, _small_state(1))
    saving = manager._thread
    waiting.wait(60)
    monkeypatch.setattr('jax.process_count', lambda: 2)
    raise KeyError('of the caller')
  assert saving.is_alive()
  assert 'the save under way was given up' in caplog.text
  lost.set()
  saving.join()


def test_unfinished_steps_are_noticed_once_and_ignored(
  tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  with _manager(tmp_path) as manager:
    manager.save(1, {'w': jnp.zeros(2)})
  (tmp_path / '2' / 'arrays').mkdir(parents=True)
  (tmp_path / 'notes').mkdir()
  manager = _manager(tmp_path)
  with caplog.at_level(logging.WARNING, logger='exitax.checkpoint'):
    assert manager.latest_step() == 1
    assert manager.latest_step() == 1
  assert [record.message for record in caplog.records if '/2' in record.message] == [
    f'ignoring unfinished checkpoint {tmp_path / "2"}: its save was cut short; '
    'the next save removes it'
  ]
  assert (tmp_path / '2').exists()
  with manager:
    manager.save(3, {'w': jnp.zeros(2)})
  assert manager.steps() == [1, 3]
  assert not (tmp_path / '2').exists()
  assert (tmp_path / 'notes').exists()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda s: s.replace(params=_params(1, width=6)),
      r'params/blocks/mlp/kernel is \[4, 8, 16\] in the checkpoint, \[4, 6, 16\] in the config',
    ),
    (
      lambda s: s.replace(step=jnp.float32(0)),
      'step is int32 in the checkpoint, float32 in the configuration',
    ),
    (
      lambda s: s.replace(params={k: v for k, v in s.params.items() if k != 'exits'}),
      r'params/exits/2/bias is \[8\] float32 in the checkpoint, missing in the configuration',
    ),
    (
      lambda s: s.replace(params={**s.params, 'head': {'kernel': jnp.zeros((8, 16))}}),
      r'params/head/kernel is missing in the checkpoint, \[8,16\] float32 in the configuration',
    ),
    (
      lambda s: s.replace(params={str(i): jnp.zeros(1) for i in range(9)}),
      r'params/0 is missing.*params/3 is missing in [^;]*; and 8 more',
    ),
  ],
)
def test_mismatches_name_the_leaves(tmp_path: Path, change: Any, message: str) -> None:
  state = _small_state(1)
  with _manager(tmp_path) as manager:
    manager.save(1, state)
    with pytest.raises(checkpoint.CheckpointError, match=message):
      manager.restore(_abstract(change(state)))


def test_a_missing_step_names_those_there_are(tmp_path: Path) -> None:
  manager = _manager(tmp_path / 'absent')
  assert (manager.steps(), manager.latest_step(), manager.best_step()) == ([], None, None)
  with pytest.raises(checkpoint.CheckpointError, match='absent holds no finished checkpoint'):
    manager.restore({})
  with manager:
    manager.save(10, {'w': jnp.zeros(2)})
    manager.save(20, {'w': jnp.zeros(2)})
  with pytest.raises(checkpoint.CheckpointError, match=r'step 15 is not .*: choose 10, 20'):
    manager.restore({}, step=15)


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    ({'a': {'b': 'text'}}, 'a/b is a str'),
    ({'a/b': 1}, 'without "/"'),
    ({'a': 2**40}, 'a does not fit int32'),
  ],
)
def test_refuses_states_it_could_not_give_back(tmp_path: Path, state: Any, message: str) -> None:
  manager = _manager(tmp_path)
  with pytest.raises(ValueError, match=message):
    manager.save(1, state)
  with pytest.raises(TypeError):
    manager.save(1, {'w': 1}, extras={'no': object()})
  assert list(tmp_path.iterdir()) == []
