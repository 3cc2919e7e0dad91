"""One optimizer step: accumulation, and the same numbers on every mesh."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from exitax import checkpoint, models, objectives, parallel, training
from exitax.errors import UserError
from exitax.layers import HeadKind, causal, platform
from exitax.models import DropoutConfig, ExitConfig, ExitLM, ExitMatrix
from tests.training.packed_batch import BATCH, LENGTH, make_batch

QUICK = {'xla_backend_optimization_level': 0}
MODEL = models.ModelConfig(
  vocab_size=32,
  num_layers=4,
  embed_dim=16,
  num_heads=8,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=16,
  max_length=LENGTH,
  qk_norm=True,
  qkv_bias=True,
  tie_embeddings=False,
  exits=(
    ExitConfig(layer=1, head=HeadKind.NORM, matrix=ExitMatrix.FINAL),
    ExitConfig(layer=2, head=HeadKind.MLP, matrix=ExitMatrix.SHARED),
    ExitConfig(layer=3, head=HeadKind.LAYER, matrix=ExitMatrix.OWN),
  ),
)
OBJECTIVE = objectives.ObjectiveConfig(
  exit_weights=tuple(objectives.ExitWeight(start=w) for w in (0.25, 0.5, 0.75)),
  z_loss=1e-2,
  chunk_length=4,
)
# Gradient descent with momentum: what it does is linear in the gradient, unlike Adam's first step.
SCHEDULE = optax.constant_schedule(0.1)
OPTIMIZER = optax.sgd(SCHEDULE, momentum=0.9)


@pytest.fixture(scope='module', autouse=True)
def _several_blocks_of_queries():
  """Rows as short as these would otherwise be one block of the CPU's attention."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(causal, 'MIN_BLOCK', 4)
    yield


def _random_params():
  """Larger than at the start, so that every path through the model counts."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(ExitLM(MODEL).init, jax.random.key(0))

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

  return jax.tree.map_with_path(draw, shapes)


def _mesh(**sizes: int):
  config = parallel.MeshConfig(**sizes)
  count = config.data * config.pipeline * config.tensor
  return parallel.make_mesh(config, jax.devices()[:count])


def _state(mesh, rules) -> training.TrainState:
  shardings = training.state_shardings(ExitLM(MODEL), OPTIMIZER, mesh, rules)
  params = _random_params()
  opt_state = jax.tree.map(np.asarray, OPTIMIZER.init(params))
  state = training.TrainState(step=np.int32(0), params=params, opt_state=opt_state)
  return jax.device_put(state, shardings)


def _one_step(
  mesh, rules, *, accumulation_steps: int = 1, dropout: DropoutConfig = DropoutConfig()
):
  step_fn = training.make_train_step(
    ExitLM(MODEL),
    OPTIMIZER,
    objective=OBJECTIVE,
    schedule=SCHEDULE,
    accumulation_steps=accumulation_steps,
    dropout=dropout,
  )
  with parallel.use(mesh, rules):
    batch = parallel.shard_batch(make_batch(), mesh, rules)
    program = jax.jit(step_fn, donate_argnums=0, compiler_options=QUICK)
    # One thing at a time: eight emulated devices share the threads of a few cores.
    arguments = jax.block_until_ready((_state(mesh, rules), batch))
    return jax.block_until_ready(program(*arguments))


def _gradients(state: training.TrainState):
  """After one step the momentum is the gradient."""
  return jax.device_get(state.opt_state[0].trace)


@functools.cache
def _single(dropout: DropoutConfig = DropoutConfig()):
  state, metrics = _one_step(_mesh(data=1), parallel.ShardingRules(), dropout=dropout)
  return jax.device_get(state), jax.device_get(metrics)


def _assert_same(got, wanted, tolerance: float) -> None:
  """Every leaf, relative to its largest value."""
  for (path, left), right in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True
  ):
    name = jax.tree_util.keystr(path)
    largest = float(np.abs(right).max())
    assert largest > 0, name
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * largest, err_msg=name)


def test_loss_is_the_mean_over_counted_tokens():
  _, metrics = _single()
  params, batch = _random_params(), make_batch()
  logits = jax.jit(
    lambda p: models.logits_at_exits(
      ExitLM(MODEL), p, batch.tokens, batch.segment_ids, batch.positions
    ),
    compiler_options=QUICK,
  )(params)
  log_z = np.asarray(jax.nn.logsumexp(logits, axis=-1), np.float64)
  target = np.take_along_axis(np.asarray(logits), batch.targets[None, ..., None], -1)[..., 0]
  per_exit = np.sum((log_z - target + 1e-2 * log_z**2) * batch.weights, axis=(1, 2))
  wanted = np.dot([0.25, 0.5, 0.75, 1.0], per_exit) / batch.weights.sum()
  np.testing.assert_allclose(metrics.loss, wanted, rtol=1e-5)
  assert metrics.sums.tokens == batch.weights.sum()
  assert metrics.learning_rate == np.float32(0.1)
  np.testing.assert_allclose(metrics.exit_weights, [0.25, 0.5, 0.75, 1.0])


def test_step_descends_along_the_reported_gradient():
  state, metrics = _single()
  gradients = _gradients(state)
  stepped = jax.tree.map(lambda p, g: p - 0.1 * g, _random_params(), gradients)
  _assert_same(state.params, stepped, 1e-6)
  squares = sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients))
  np.testing.assert_allclose(metrics.gradient_norm, np.sqrt(squares), rtol=1e-5)
  assert state.step == 1


@pytest.mark.parametrize('accumulation_steps', [2, 8])
def test_accumulation_is_the_gradient_of_the_whole_batch(accumulation_steps):
  wanted, wanted_metrics = _single()
  state, metrics = _one_step(
    _mesh(data=1), parallel.ShardingRules(), accumulation_steps=accumulation_steps
  )
  # Another order of additions: a few units of the last place.
  _assert_same(_gradients(state), _gradients(wanted), 5e-6)
  np.testing.assert_allclose(metrics.loss, wanted_metrics.loss, rtol=1e-6)
  np.testing.assert_allclose(metrics.sums.exits.nll, wanted_metrics.sums.exits.nll, rtol=1e-6)


def test_accumulation_must_divide_the_batch():
  with pytest.raises(UserError, match=r'^accumulation_steps=3 does not divide batch_size=8'):
    _one_step(_mesh(data=1), parallel.ShardingRules(), accumulation_steps=3)


def test_weights_must_match_the_exits():
  with pytest.raises(UserError, match=r'^0 exit weights for 3 exits'):
    training.make_train_step(
      ExitLM(MODEL), OPTIMIZER, objective=objectives.ObjectiveConfig(), schedule=SCHEDULE
    )


def test_a_batch_without_counted_tokens_changes_nothing():
  mesh, rules = _mesh(data=1), parallel.ShardingRules()
  step_fn = training.make_train_step(
    ExitLM(MODEL), OPTIMIZER, objective=OBJECTIVE, schedule=SCHEDULE
  )
  empty = dataclasses.replace(make_batch(), weights=np.zeros((BATCH, LENGTH), np.float32))
  state, metrics = jax.jit(step_fn, compiler_options=QUICK)(_state(mesh, rules), empty)
  assert metrics.loss == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, _random_params())


# Every mesh with both placements of parameters and of the sequence; every pair of choices occurs.
LAYOUTS = [
  (mesh, parameters, sequence)
  for row, mesh in enumerate([(8, 1), (4, 2), (2, 4), (1, 8)])
  for parameters, sequence in (
    [('fsdp', 'tensor'), ('replicated', 'whole')],
    [('fsdp', 'whole'), ('replicated', 'tensor')],
  )[row % 2]
]


@pytest.mark.parametrize(('mesh', 'parameters', 'sequence'), LAYOUTS)
def test_loss_and_every_gradient_are_those_of_one_device(mesh, parameters, sequence):
  wanted, wanted_metrics = _single()
  rules = parallel.ShardingRules(parameters=parameters, sequence=sequence)
  state, metrics = _one_step(_mesh(data=mesh[0], tensor=mesh[1]), rules)
  query = state.params['blocks']['attention']['query']['kernel']
  shards = mesh[1] * (mesh[0] if parameters == 'fsdp' else 1)
  assert query.addressable_shards[0].data.size == query.size // shards
  _assert_same(_gradients(state), _gradients(wanted), 1e-5)
  np.testing.assert_allclose(metrics.loss, wanted_metrics.loss, rtol=1e-5)
  np.testing.assert_allclose(metrics.gradient_norm, wanted_metrics.gradient_norm, rtol=1e-5)
  for got, want in zip(
    jax.tree.leaves(metrics.sums), jax.tree.leaves(wanted_metrics.sums), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('mesh', [(4, 2), (1, 8)])
def test_the_program_of_accelerators_gives_the_same_gradients(monkeypatch, mesh):
  """There layers are scanned and attention is one square: what other machines run, run here."""
  wanted, wanted_metrics = _single()
  monkeypatch.setattr(platform, 'on_cpu', lambda: False)
  state, metrics = _one_step(_mesh(data=mesh[0], tensor=mesh[1]), parallel.ShardingRules())
  _assert_same(_gradients(state), _gradients(wanted), 1e-5)
  np.testing.assert_allclose(metrics.loss, wanted_metrics.loss, rtol=1e-5)


def test_accumulation_on_a_mesh_is_the_same_gradient():
  wanted, _ = _single()
  state, _ = _one_step(_mesh(data=4, tensor=2), parallel.ShardingRules(), accumulation_steps=2)
  _assert_same(_gradients(state), _gradients(wanted), 1e-5)


DROPPED = DropoutConfig(residual_rate=0.2, embedding_rate=0.1, layer_rate=0.4, seed=1)


@pytest.mark.parametrize(
  ('sizes', 'accumulation_steps'),
  [((1, 1), 4), ((8, 1), 1), ((4, 2), 2)],
  ids=['accumulated', 'data', 'both'],
)
def test_what_is_dropped_depends_on_the_row_of_the_batch_alone(sizes, accumulation_steps):
  wanted, wanted_metrics = _single(DROPPED)
  per_exit, whole = wanted_metrics.sums.exits.nll, _single()[1].sums.exits.nll
  assert (np.abs(per_exit - whole) > 1e-2 * whole).all()
  state, metrics = _one_step(
    _mesh(data=sizes[0], tensor=sizes[1]),
    parallel.ShardingRules(),
    accumulation_steps=accumulation_steps,
    dropout=DROPPED,
  )
  _assert_same(_gradients(state), _gradients(wanted), 1e-5)
  np.testing.assert_allclose(metrics.loss, wanted_metrics.loss, rtol=1e-5)


def _program(dropout: DropoutConfig, **changes):
  """The jaxpr of a step as text, and its flops."""
  model = ExitLM(dataclasses.replace(MODEL, **changes))
  step_fn = training.make_train_step(
    model, OPTIMIZER, objective=OBJECTIVE, schedule=SCHEDULE, dropout=dropout
  )
  arguments = (_state(_mesh(data=1), parallel.ShardingRules()), make_batch())
  text = re.sub(r'0x[0-9a-f]+', '', str(jax.make_jaxpr(step_fn)(*arguments)))
  return text, parallel.count_flops(step_fn, *arguments)


RANDOM = ('random_', 'threefry', 'key<')


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_step_that_drops_nothing_has_no_keys_and_no_masks(remat):
  plain, flops = _program(DropoutConfig(), remat=remat)
  assert not any(word in plain for word in RANDOM)
  # A seed and a curriculum alone change no rate.
  idle, _ = _program(DropoutConfig(seed=5, curriculum_steps=9), remat=remat)
  assert idle == plain
  dropped, dropped_flops = _program(DROPPED, remat=remat)
  assert all(word in dropped for word in ('random_bits', 'random_fold_in', 'key<'))
  # Masks are no matrix products: utilisation counts as before.
  assert dropped_flops == flops


def test_steps_drop_differently():
  mesh, rules = _mesh(data=1), parallel.ShardingRules()
  step_fn = training.make_train_step(
    ExitLM(MODEL), OPTIMIZER, objective=OBJECTIVE, schedule=SCHEDULE, dropout=DROPPED
  )
  program = jax.jit(step_fn, compiler_options=QUICK)
  state = _state(mesh, rules)
  losses = [
    float(program(dataclasses.replace(state, step=np.int32(step)), make_batch())[1].loss)
    for step in (0, 1, 2, 1)
  ]
  assert losses[0] == _single(DROPPED)[1].loss
  assert len(set(losses[:3])) == 3
  assert losses[3] == losses[1]


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
  """Saved after a step on 8 x 1, restored on 2 x 4 and on one device: the next step is the same."""
  rules = parallel.ShardingRules()
  state, _ = _one_step(_mesh(data=8), rules)
  with checkpoint.CheckpointManager(tmp_path) as manager:
    manager.save(1, state)
  step_fn = training.make_train_step(
    ExitLM(MODEL), OPTIMIZER, objective=OBJECTIVE, schedule=SCHEDULE
  )
  results = []
  for mesh in (_mesh(data=1), _mesh(data=2, tensor=4)):
    abstract = training.abstract_state(ExitLM(MODEL), OPTIMIZER, mesh, rules)
    restored = manager.restore(abstract).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    shardings = training.state_shardings(ExitLM(MODEL), OPTIMIZER, mesh, rules)
    jax.tree.map(
      lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
      restored,
      shardings,
    )
    with parallel.use(mesh, rules):
      batch = parallel.shard_batch(make_batch(), mesh, rules)
      results.append(jax.device_get(jax.jit(step_fn, compiler_options=QUICK)(restored, batch)))
  (first, first_metrics), (second, second_metrics) = results
  assert first.step == second.step == 2
  _assert_same(second.params, first.params, 1e-5)
  np.testing.assert_allclose(second_metrics.loss, first_metrics.loss, rtol=1e-5)


@pytest.mark.parametrize('mesh', [(4, 2), (1, 8)])
def test_initialisation_does_not_depend_on_the_mesh(mesh):
  model, rules = ExitLM(MODEL), parallel.ShardingRules()
  optimizer = training.make_optimizer(training.OptimizerConfig(), SCHEDULE)
  wanted = training.init_state(model, optimizer, jax.random.key(3), _mesh(data=1), rules).params
  sharded = _mesh(data=mesh[0], tensor=mesh[1])
  state = training.init_state(model, optimizer, jax.random.key(3), sharded, rules)
  jax.tree.map(np.testing.assert_array_equal, state.params, wanted)
  shardings = training.state_shardings(model, optimizer, sharded, rules)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  # The moments lie where their parameters lie.
  moments = [s for s in jax.tree.leaves(state.opt_state) if s.shape == (32, 16)]
  assert len(moments) >= 8
  assert {m.sharding.spec for m in moments} == {state.params['embed']['matrix'].sharding.spec}
  assert not any(jnp.any(m) for m in moments)
