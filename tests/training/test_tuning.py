"""EE-Tuning: the backbone stays bit for bit, the exits' gradients are exact, nothing deeper runs."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from exitax import models, objectives, parallel, training
from exitax.checkpoint import LoadedModel
from exitax.data import ByteTokenizer
from exitax.errors import UserError
from exitax.layers import LORA_LEAVES, HeadKind, LoraConfig, Precision, merge_lora
from exitax.models import ExitConfig, ExitLM, ExitMatrix
from exitax.training import InitialExits, PipelineConfig, PipelinedTuning, Trained
from tests.training.packed_batch import LENGTH, make_batch

EXITS = (
  ExitConfig(layer=1, head=HeadKind.NORM, matrix=ExitMatrix.FINAL),
  ExitConfig(layer=2, head=HeadKind.MLP, matrix=ExitMatrix.SHARED),
  ExitConfig(layer=4, head=HeadKind.LAYER, matrix=ExitMatrix.OWN),
)
OBJECTIVE = objectives.ObjectiveConfig(
  exit_weights=tuple(objectives.ExitWeight(start=w) for w in (0.25, 0.5, 0.75)),
  z_loss=1e-2,
  chunk_length=4,
)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
# Every test that compiles for a mesh does so without optimization: each program runs once or twice.
QUICK = {'xla_backend_optimization_level': 0}


def _config(
  *, exits: tuple[ExitConfig, ...] = EXITS, precision: Precision = Precision.FLOAT32
) -> models.ModelConfig:
  return models.ModelConfig(
    vocab_size=32,
    num_layers=6,
    embed_dim=16,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=16,
    max_length=LENGTH,
    tie_embeddings=False,
    exits=exits,
    precision=precision,
  )


def _random_params(model: ExitLM) -> models.Params:
  rng = np.random.default_rng(1)
  wide = np.float64 if model.config.precision is Precision.FLOAT64 else np.float32

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(wide)

  return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


@functools.cache
def _expected(model: ExitLM) -> tuple[float, objectives.LossSums, models.Params]:
  """From the whole model: loss of the exits alone, sums, gradient of everything."""
  weights = OBJECTIVE.weights_at(0).at[-1].set(0.0)

  def loss(params):
    return objectives.exit_objective(model, params, make_batch(), weights, config=OBJECTIVE)

  (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(_random_params(model))
  return float(value), jax.device_get(sums), jax.device_get(gradient)


def _check(found, model: ExitLM, *, tolerance: float) -> None:
  (value, sums), gradient = jax.device_get(found)
  wanted_value, wanted_sums, wanted = _expected(model)
  wanted, _ = training.split_trained(wanted, Trained.EXITS)
  assert jax.tree.structure(gradient) == jax.tree.structure(wanted)
  for (path, found_leaf), leaf in zip(
    jax.tree.leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True
  ):
    assert np.abs(leaf).max() > 0, path
    np.testing.assert_allclose(
      found_leaf, leaf, atol=tolerance * np.abs(leaf).max(), rtol=0, err_msg=str(path)
    )
  np.testing.assert_allclose(value, wanted_value, rtol=tolerance)
  np.testing.assert_allclose(sums.exits.nll[:-1], wanted_sums.exits.nll[:-1], rtol=tolerance)
  assert sums.exits.nll[-1] == 0  # The final layer was not run.


def _step(model: ExitLM):
  return training.make_train_step(
    model, OPTIMIZER, objective=OBJECTIVE, schedule=lambda _: 0.1, trained=Trained.EXITS
  )


def _state(model: ExitLM) -> training.TrainState:
  params = jax.tree.map(jnp.asarray, _random_params(model))
  own, _ = training.split_trained(params, Trained.EXITS)
  return training.TrainState(
    step=jnp.zeros((), jnp.int32), params=params, opt_state=OPTIMIZER.init(own)
  )


def test_a_step_changes_the_exits_by_their_exact_gradient_and_nothing_else() -> None:
  model = ExitLM(_config())
  before = jax.device_get(_state(model))
  after, metrics = jax.jit(_step(model))(_state(model), make_batch())
  _, _, gradient = _expected(model)
  tokens = float(make_batch().weights.sum())
  for path, leaf in jax.tree.leaves_with_path(before.params):
    new, slope = after.params, gradient
    for key in path:
      new, slope = new[key.key], slope[key.key]
    if path[0].key in ('exits', 'shared_exit'):
      np.testing.assert_allclose(leaf - 0.1 * slope / tokens, new, atol=1e-6, err_msg=str(path))
      assert not np.array_equal(leaf, new), path
    else:
      assert np.array_equal(leaf, new), path
  assert len(jax.tree.leaves(after.opt_state)) == len(
    jax.tree.leaves(training.split_trained(before.params, Trained.EXITS)[0])
  )
  assert metrics.sums.exits.nll[-1] == 0


def test_final_scores_are_the_same_bit_for_bit() -> None:
  model, batch = ExitLM(_config()), make_batch()
  score = jax.jit(
    lambda params: models.logits_at_exits(
      model, params, batch.tokens, batch.segment_ids, batch.positions
    )
  )
  before = score(_state(model).params)
  state = _state(model)
  for _ in range(3):
    state, _ = jax.jit(_step(model))(state, batch)
  after = score(state.params)
  assert np.array_equal(before[-1], after[-1])
  assert all(not np.array_equal(before[i], after[i]) for i in range(3))


def test_nothing_behind_the_last_exit_is_computed() -> None:
  """Flops of a step do not depend on the layers behind; with a backward they would be three times those of a forward."""
  shallow = ExitLM(dataclasses.replace(_config(), num_layers=5))
  counts = []
  for model in (ExitLM(_config()), shallow):
    state = jax.eval_shape(lambda model=model: _state(model))
    counts.append(parallel.count_flops(_step(model), state, make_batch()).flops)
  assert counts[0] == counts[1]
  # Through four of six layers, forwards only: well below a third of a step that trains all.
  whole = training.make_train_step(
    ExitLM(_config()), OPTIMIZER, objective=OBJECTIVE, schedule=lambda _: 0.1
  )
  state = jax.eval_shape(lambda: _state(ExitLM(_config())))
  state = dataclasses.replace(state, opt_state=jax.eval_shape(OPTIMIZER.init, state.params))
  assert counts[0] < 0.6 * parallel.count_flops(whole, state, make_batch()).flops


@pytest.mark.parametrize('head', HeadKind)
def test_copied_exits_start_lower_than_random_ones(head: HeadKind) -> None:
  """On a backbone that knows something: trained for a few steps on the very batch."""
  plain = ExitLM(_config(exits=()))
  objective = objectives.ObjectiveConfig(chunk_length=4)
  optimizer = optax.adam(3e-3)
  step = jax.jit(
    training.make_train_step(plain, optimizer, objective=objective, schedule=lambda _: 0.1)
  )
  params = plain.init(jax.random.key(0))
  state = training.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
  for _ in range(60):
    state, _ = step(state, make_batch())
  source = LoadedModel(
    model=plain, params=state.params, tokenizer=ByteTokenizer(), step=0, directory=Path('source')
  )
  exits = tuple(ExitConfig(layer=n, head=head, matrix=ExitMatrix.OWN) for n in (2, 4, 5))
  model = ExitLM(_config(exits=exits))
  score = jax.jit(objectives.make_score_fn(model))
  losses = {}
  for how in InitialExits:
    fresh = model.init(jax.random.key(1))
    started = training.initial_params(model, fresh, source, how)
    for name in ('embed', 'blocks', 'norm', 'head'):
      assert all(
        np.array_equal(a, b)
        for a, b in zip(
          jax.tree.leaves(started[name]), jax.tree.leaves(source.params[name]), strict=True
        )
      )
    losses[how] = score(started, make_batch()).exits.nll
  # A whole layer more, the last one, may suit a shallow stream badly; the others must win everywhere.
  compared = slice(-2, -1) if head is HeadKind.LAYER else slice(0, -1)
  assert np.all(losses[InitialExits.COPY][compared] < losses[InitialExits.RANDOM][compared])
  assert losses[InitialExits.COPY][-1] == losses[InitialExits.RANDOM][-1]


def test_exits_that_the_source_has_are_kept() -> None:
  old = ExitLM(_config(exits=EXITS[:2]))
  source = LoadedModel(
    model=old, params=_random_params(old), tokenizer=ByteTokenizer(), step=0, directory=Path('x')
  )
  model = ExitLM(_config())
  started = training.initial_params(model, model.init(jax.random.key(1)), source, InitialExits.COPY)
  for name in ('1', '2'):
    pairs = zip(
      jax.tree.leaves(started['exits'][name]),
      jax.tree.leaves(source.params['exits'][name]),
      strict=True,
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
  assert np.array_equal(started['shared_exit']['matrix'], source.params['shared_exit']['matrix'])
  assert np.array_equal(started['exits']['4']['matrix'], source.params['head']['matrix'])
  other = ExitLM(dataclasses.replace(_config(), num_layers=7))
  with pytest.raises(UserError, match='holds a model of another shape'):
    training.initial_params(other, other.init(jax.random.key(0)), source, InitialExits.COPY)


def _tuning(
  model: ExitLM, rules: parallel.ShardingRules, **settings
) -> tuple[PipelinedTuning, jax.sharding.Mesh]:
  sizes = {'data': 1, 'pipeline': 2, 'tensor': 1}
  sizes |= {name: settings.pop(name) for name in list(sizes) if name in settings}
  count = int(np.prod(list(sizes.values())))
  mesh = parallel.make_mesh(parallel.MeshConfig(**sizes), jax.devices()[:count])
  pipeline = PipelineConfig(**{'num_microbatches': 2, **settings})
  return PipelinedTuning(model, mesh, rules, objective=OBJECTIVE, pipeline=pipeline), mesh


def _run_tuning(model: ExitLM, rules=parallel.ShardingRules(), **settings):
  tuning, mesh = _tuning(model, rules, **settings)
  with parallel.use(mesh, rules):
    shardings = parallel.tree_shardings(model.abstract_params(), model.logical_axes(), mesh, rules)
    params = jax.device_put(_random_params(model), shardings)
    batch = parallel.shard_batch(make_batch(), mesh, rules)
    weights = OBJECTIVE.weights_at(0)
    run = jax.jit(tuning.value_and_grad, compiler_options=QUICK)
    return run(params, batch, weights), run.lower(params, batch, weights)


@pytest.mark.parametrize(
  'settings',
  [
    {'pipeline': 2},
    {'pipeline': 4, 'num_microbatches': 4},
    {'pipeline': 2, 'num_chunks': 2, 'schedule': 'interleaved'},
    {'pipeline': 2, 'data': 2, 'tensor': 2},
    {'pipeline': 2, 'vocab': 'stage'},
  ],
  ids=str,
)
def test_a_pipeline_gives_the_same_gradients(settings: dict) -> None:
  model = ExitLM(_config())
  found, _ = _run_tuning(model, **settings)
  _check(found, model, tolerance=1e-5)


@pytest.mark.parametrize('num_stages', [1, 2, 4])
def test_gradients_in_float64(num_stages: int) -> None:
  with jax.enable_x64(True):
    model = ExitLM(_config(precision=Precision.FLOAT64))
    if num_stages == 1:
      own, frozen = training.split_trained(_random_params(model), Trained.EXITS)

      def loss(own):
        return objectives.exit_objective(
          model,
          training.join_trained(own, frozen),
          make_batch(),
          OBJECTIVE.weights_at(0),
          config=OBJECTIVE,
          depth=training.trained_depth(model.config, Trained.EXITS),
        )

      found = jax.jit(jax.value_and_grad(loss, has_aux=True))(own)
    else:
      found, _ = _run_tuning(model, pipeline=num_stages, num_microbatches=4)
    _check(found, model, tolerance=1e-10)


def test_no_gradient_crosses_stages() -> None:
  """Hidden states go one way, to the next stage; training the whole model sends gradients back."""
  _, lowered = _run_tuning(ExitLM(_config()), pipeline=2)
  assert _exchanges(lowered.as_text()) == {'[[0, 1]]'}
  assert _exchanges(_whole_program()) == {'[[0, 1]]', '[[1, 0]]'}


def _exchanges(program: str) -> set[str]:
  """Which stages send to which, in all exchanges of a lowered program."""
  pattern = r'collective_permute.*source_target_pairs = dense<(\[\[.*?\]\])>'
  return set(re.findall(pattern, program))


def _whole_program() -> str:
  model, rules = ExitLM(_config()), parallel.ShardingRules()
  mesh = parallel.make_mesh(parallel.MeshConfig(data=1, pipeline=2, tensor=1), jax.devices()[:2])
  pipelined = training.PipelinedObjective(
    model,
    mesh,
    rules,
    objective=OBJECTIVE,
    pipeline=PipelineConfig(num_microbatches=2, vocab='stage'),
  )
  with parallel.use(mesh, rules):
    batch = parallel.shard_batch(make_batch(), mesh, rules)
    lowered = jax.jit(pipelined.value_and_grad).lower(
      _random_params(model), batch, OBJECTIVE.weights_at(0)
    )
  return lowered.as_text()


def test_scores_of_a_pipeline_are_those_of_the_whole_model() -> None:
  model, rules = ExitLM(_config()), parallel.ShardingRules()
  tuning, mesh = _tuning(model, rules, pipeline=2)
  with parallel.use(mesh, rules):
    found = jax.jit(tuning.score)(
      _random_params(model), parallel.shard_batch(make_batch(), mesh, rules)
    )
  _, wanted, _ = _expected(model)
  np.testing.assert_allclose(found.exits.nll, wanted.exits.nll, rtol=1e-5)
  with pytest.raises(UserError, match='pipeline=8 is more than'):
    _tuning(model, rules, pipeline=8)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'exits': ()}, 'the model has none'),
    ({'initial_checkpoint': None}, 'needs LoopConfig.initial_checkpoint'),
    ({'layer_rate': 0.1}, 'drops nothing in the frozen model'),
    (
      {'exits': (ExitConfig(layer=1, head=HeadKind.EMBEDDING, matrix=ExitMatrix.FINAL),)},
      'no parameters of their own',
    ),
  ],
)
def test_runs_that_cannot_tune_are_refused(changes: dict, message: str) -> None:
  with pytest.raises(UserError, match=message):
    training.RunConfig(
      model=_config(exits=changes.get('exits', EXITS)),
      data=_data(),
      loop=training.LoopConfig(
        train_steps=1, initial_checkpoint=changes.get('initial_checkpoint', 'somewhere')
      ),
      dropout=models.DropoutConfig(layer_rate=changes.get('layer_rate', 0.0)),
      trained='exits',
    )


def _data():
  from exitax.data import ByteVocabulary, DataConfig

  return DataConfig(vocabulary=ByteVocabulary(), length=LENGTH, batch_size=8)


def _lora_config(*, precision: Precision = Precision.FLOAT32) -> models.ModelConfig:
  return dataclasses.replace(_config(precision=precision), lora=LoraConfig(rank=2, alpha=3.0))


@pytest.mark.parametrize('trained', [Trained.LORA, Trained.LORA_AND_EXITS])
def test_adapters_are_trained_by_their_exact_gradient_and_nothing_else(trained: Trained) -> None:
  model = ExitLM(_lora_config())
  params = jax.tree.map(jnp.asarray, _random_params(model))
  own, _ = training.split_trained(params, trained)
  names = {path[-1].key for path, _ in jax.tree.leaves_with_path(own)}
  assert set(LORA_LEAVES) <= names
  assert ('matrix' in names) == (trained is Trained.LORA_AND_EXITS)
  step = training.make_train_step(
    model, OPTIMIZER, objective=OBJECTIVE, schedule=lambda _: 0.1, trained=trained
  )
  state = training.TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(own))
  after, _ = jax.jit(step)(state, make_batch())

  def loss(params):
    weights = OBJECTIVE.weights_at(0)
    return objectives.exit_objective(model, params, make_batch(), weights, config=OBJECTIVE)[0]

  gradient = jax.jit(jax.grad(loss))(params)
  tokens = float(make_batch().weights.sum())
  for path, leaf in jax.tree.leaves_with_path(params):
    new, slope = after.params, gradient
    for key in path:
      new, slope = new[key.key], slope[key.key]
    changes = path[-1].key in LORA_LEAVES or (
      trained.exits and path[0].key in ('exits', 'shared_exit')
    )
    if changes:
      np.testing.assert_allclose(leaf - 0.1 * slope / tokens, new, atol=1e-6, err_msg=str(path))
      assert not np.array_equal(leaf, new), path
    else:
      assert np.array_equal(leaf, new), path


def test_adapters_over_a_pipeline() -> None:
  model, rules = ExitLM(_lora_config()), parallel.ShardingRules()
  mesh = parallel.make_mesh(parallel.MeshConfig(data=2, pipeline=2, tensor=2))
  pipelined = training.PipelinedObjective(
    model, mesh, rules, objective=OBJECTIVE, pipeline=PipelineConfig(num_microbatches=2)
  )
  params = _random_params(model)

  def loss(params):
    weights = OBJECTIVE.weights_at(0)
    return objectives.exit_objective(model, params, make_batch(), weights, config=OBJECTIVE)[0]

  wanted = jax.jit(jax.grad(loss))(params)
  with parallel.use(mesh, rules):
    shardings = parallel.tree_shardings(model.abstract_params(), model.logical_axes(), mesh, rules)
    _, found = jax.jit(pipelined.value_and_grad, compiler_options=QUICK)(
      jax.device_put(params, shardings),
      parallel.shard_batch(make_batch(), mesh, rules),
      OBJECTIVE.weights_at(0),
    )
  for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(
      np.asarray(a), b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=str(path)
    )


def test_adapters_start_on_a_frozen_model_and_are_merged_when_gone_on_from() -> None:
  old = ExitLM(_config(exits=()))
  source = LoadedModel(
    model=old, params=_random_params(old), tokenizer=ByteTokenizer(), step=0, directory=Path('x')
  )
  model = ExitLM(_lora_config())
  fresh = model.init(jax.random.key(1))
  started = training.initial_params(model, fresh, source, InitialExits.COPY)
  assert jax.tree.structure(started) == jax.tree.structure(fresh)
  query = started['blocks']['attention']['query']
  assert np.array_equal(query['kernel'], source.params['blocks']['attention']['query']['kernel'])
  assert np.array_equal(query['lora_a'], fresh['blocks']['attention']['query']['lora_a'])
  adapted = dataclasses.replace(source, model=model, params=_random_params(model))
  again = training.initial_params(model, fresh, adapted, InitialExits.COPY)
  merged = merge_lora(adapted.params, model.config.lora)
  assert np.array_equal(
    again['blocks']['mlp']['up']['kernel'], merged['blocks']['mlp']['up']['kernel']
  )
