"""The model over a pipeline: loss, sums and every gradient leaf are those of one device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from exitax import models, objectives, parallel
from exitax.errors import UserError
from exitax.layers import HeadKind, Precision
from exitax.models import DropoutConfig, ExitConfig, ExitLM, ExitMatrix, Remat
from exitax.parallel.residuals import residuals_of
from exitax.training import PipelineConfig, PipelinedObjective
from tests.training.packed_batch import BATCH, LENGTH, make_batch

QUICK = {'xla_backend_optimization_level': 0}
LAYERS = 4
STEP = 3
KEPT = DropoutConfig()
DROPPED = DropoutConfig(
  residual_rate=0.2, embedding_rate=0.1, layer_rate=0.6, curriculum_steps=5, seed=1
)

EXITS = {
  'none': (),
  # Two stages of two layers: in the middle of the first, and at the boundary.
  'middle': (ExitConfig(layer=1, head=HeadKind.NORM, matrix=ExitMatrix.INPUT),),
  'boundary': (ExitConfig(layer=2, head=HeadKind.MLP, matrix=ExitMatrix.OWN),),
  'all_heads': (
    ExitConfig(layer=1, head=HeadKind.EMBEDDING, matrix=ExitMatrix.SHARED),
    ExitConfig(layer=2, head=HeadKind.MLP, matrix=ExitMatrix.SHARED),
    ExitConfig(layer=3, head=HeadKind.LAYER, matrix=ExitMatrix.OWN),
  ),
}


def _model(exits: str, *, tied: bool, precision: Precision = Precision.FLOAT32) -> ExitLM:
  return ExitLM(
    models.ModelConfig(
      vocab_size=32,
      num_layers=LAYERS,
      embed_dim=16,
      num_heads=8,
      num_kv_heads=2,
      head_dim=4,
      mlp_dim=16,
      max_length=LENGTH,
      qk_norm=True,
      qkv_bias=True,
      tie_embeddings=tied,
      exits=EXITS[exits],
      precision=precision,
    )
  )


def _objective(model: ExitLM) -> objectives.ObjectiveConfig:
  weights = [objectives.ExitWeight(start=0.25 * (i + 1)) for i in range(len(model.config.exits))]
  return objectives.ObjectiveConfig(exit_weights=tuple(weights), z_loss=1e-2, chunk_length=4)


def _random_params(model: ExitLM):
  """Larger than at the start, so that every path through the model counts."""
  rng = np.random.default_rng(1)
  wide = np.float64 if model.config.precision is Precision.FLOAT64 else np.float32

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(wide)

  return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def _dropout(config: DropoutConfig):
  return config.at(STEP, num_layers=LAYERS, num_rows=BATCH)


@functools.cache
def _sequential(model: ExitLM, dropout: DropoutConfig = KEPT):
  objective = _objective(model)

  def loss(params):
    weights = objective.weights_at(0)
    return objectives.exit_objective(
      model, params, make_batch(), weights, config=objective, dropout=_dropout(dropout)
    )

  program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
  return jax.device_get(program(_random_params(model)))


def _pipelined(
  model: ExitLM,
  sizes: tuple[int, int, int],
  config: PipelineConfig,
  rules=None,
  dropout: DropoutConfig = KEPT,
  *,
  scores: bool = False,
):
  """Loss, sums and gradients; and the scores of `PipelinedObjective.score`, another program, if asked for."""
  rules = rules or parallel.ShardingRules()
  num_devices = int(np.prod(sizes))
  mesh = parallel.make_mesh(parallel.MeshConfig(*sizes), jax.devices()[:num_devices])
  with parallel.use(mesh, rules):
    objective = _objective(model)
    pipelined = PipelinedObjective(model, mesh, rules, objective=objective, pipeline=config)
    params = _random_params(model)
    layout = parallel.tree_shardings(params, model.logical_axes(), mesh, rules)
    arguments = jax.block_until_ready(
      (
        jax.device_put(params, layout),
        parallel.shard_batch(make_batch(), mesh, rules),
        objective.weights_at(0),
        _dropout(dropout),
      )
    )
    step = jax.jit(pipelined.value_and_grad, compiler_options=QUICK)
    found = jax.block_until_ready(step(*arguments))
    if not scores:
      return jax.device_get(found), None
    score = jax.jit(pipelined.score, compiler_options=QUICK)
    return jax.device_get((found, score(*arguments[:2])))


def _check(model: ExitLM, found, tolerance: float, dropout: DropoutConfig = KEPT) -> None:
  ((loss, sums), grads), scored = found
  (wanted_loss, wanted_sums), wanted_grads = _sequential(model, dropout)
  # Scores never drop.
  (_, wanted_scores), _ = _sequential(model)
  np.testing.assert_allclose(loss, wanted_loss, rtol=tolerance)
  for got, wanted in ((sums, wanted_sums), (scored, wanted_scores)):
    if got is None:
      continue
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(left, right, rtol=tolerance)
  assert jax.tree.structure(grads) == jax.tree.structure(wanted_grads)
  for (path, left), right in zip(
    jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True
  ):
    name = jax.tree_util.keystr(path)
    largest = float(np.abs(right).max())
    assert largest > 0, name
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * largest, err_msg=name)


# Every pair of (mesh, schedule), (schedule, exits), (exits, recompute), (recompute, vocabulary) and
# most others; the full product is benchmarks/pipeline_exactness.py.
CASES = [
  ((1, 2, 1), '1f1b', 1, 'all_heads', True, 'none', 'pipeline'),
  ((2, 2, 2), '1f1b', 1, 'all_heads', False, 'stage', 'stage'),
  ((2, 2, 2), 'interleaved', 2, 'boundary', True, 'selective', 'pipeline'),
  ((1, 4, 2), 'gpipe', 1, 'all_heads', False, 'layer', 'pipeline'),
  ((2, 4, 1), '1f1b', 1, 'boundary', False, 'none', 'stage'),
  ((4, 2, 1), 'gpipe', 1, 'middle', True, 'none', 'pipeline'),
  ((1, 2, 4), 'interleaved', 2, 'middle', False, 'none', 'stage'),
  ((2, 4, 1), 'gpipe', 1, 'none', True, 'stage', 'pipeline'),
  ((1, 2, 2), '1f1b', 1, 'none', False, 'selective', 'pipeline'),
  ((2, 2, 1), 'interleaved', 2, 'all_heads', True, 'layer', 'pipeline'),
  ((8, 1, 1), '1f1b', 1, 'middle', True, 'stage', 'stage'),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('sizes', 'schedule', 'chunks', 'exits', 'tied', 'recompute', 'vocab'), CASES
)
def test_gradients_are_those_of_one_device(sizes, schedule, chunks, exits, tied, recompute, vocab):
  model = _model(exits, tied=tied)
  config = PipelineConfig(
    schedule=schedule,
    num_microbatches=min(4, BATCH // sizes[0]),
    num_chunks=chunks,
    recompute=recompute,
    vocab=vocab,
  )
  # Scores are another program: on a whole mesh here, in float64 and for uneven stages below.
  _check(model, _pipelined(model, sizes, config, scores=sizes == (2, 2, 2)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('stages', [1, 2, 4])
def test_gradients_are_exact_in_float64(x64, stages):
  model = _model('all_heads', tied=False, precision=Precision.FLOAT64)
  vocab = 'stage' if stages == 2 else 'pipeline'
  config = PipelineConfig(num_microbatches=4, recompute='none', vocab=vocab)
  _check(model, _pipelined(model, (1, stages, 1), config, scores=True), 1e-10)


@pytest.mark.parametrize('layers', [None, (1, 1, 2)], ids=['as_even_as_it_gets', 'as_told'])
def test_stages_may_differ_in_layers(layers):
  model = _model('all_heads', tied=True)
  config = PipelineConfig(num_microbatches=4, layers_per_span=layers, vocab='stage')
  _check(model, _pipelined(model, (1, 3, 1), config, scores=True), 1e-5)


# With the test in float64: every mesh axis, schedule, way of recomputation and placement of scores,
# and uneven layers.
DROPOUT_CASES = [
  ((2, 2, 2), 'interleaved', 2, None, 'selective', 'stage'),
  ((2, 4, 1), 'gpipe', 1, None, 'layer', 'pipeline'),
  ((1, 3, 1), '1f1b', 1, (1, 1, 2), 'stage', 'stage'),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('sizes', 'schedule', 'chunks', 'layers', 'recompute', 'vocab'), DROPOUT_CASES
)
def test_what_is_dropped_is_what_one_device_drops(
  sizes, schedule, chunks, layers, recompute, vocab
):
  model = _model('boundary', tied=True)
  config = PipelineConfig(
    schedule=schedule,
    num_microbatches=min(4, BATCH // sizes[0]),
    num_chunks=chunks,
    layers_per_span=layers,
    recompute=recompute,
    vocab=vocab,
  )
  (dropped, _), _ = _sequential(model, DROPPED)
  (whole, _), _ = _sequential(model)
  assert abs(dropped - whole) > 1e-2 * whole
  _check(model, _pipelined(model, sizes, config, dropout=DROPPED), 1e-5, DROPPED)


@pytest.mark.slow
def test_dropout_is_exact_in_float64(x64):
  model = _model('all_heads', tied=False, precision=Precision.FLOAT64)
  config = PipelineConfig(num_microbatches=4, recompute='none', vocab='stage')
  _check(model, _pipelined(model, (1, 2, 1), config, dropout=DROPPED), 1e-10, DROPPED)


@pytest.mark.parametrize('remat', list(Remat))
def test_masks_are_not_kept_for_the_backward(remat):
  """They come from keys again: the ring of a stage holds what it holds without dropout."""
  model = ExitLM(dataclasses.replace(_model('boundary', tied=True).config, remat=remat))
  plan = models.plan_stages(model.config, num_stages=2)
  stage = objectives.VocabPlacement.STAGE
  program = objectives.SpanObjective(model, plan, _objective(model), stage, parallel.PIPELINE_AXIS)
  params = _random_params(model)
  blocks = jax.tree.map(lambda x: x[0, 0], models.stack_spans(plan, params['blocks']))
  shared = objectives.split_shared(model, params, stage)

  def kept(dropout: DropoutConfig):
    def residuals(blocks, shared, hidden, microbatch, span):
      def run(*args):
        return program.run(*args, microbatch, span)

      return residuals_of(run, blocks, shared, hidden)[1]

    microbatch = objectives.Microbatch(make_batch(), np.ones(2), _dropout(dropout))
    hidden = program.hidden_like(microbatch)
    found = jax.eval_shape(residuals, blocks, shared, hidden, microbatch, np.int32(1))
    return [(x.shape, x.dtype) for x in found]

  assert kept(DROPPED)
  assert sorted(kept(DROPPED)) == sorted(kept(KEPT))
  assert all(np.issubdtype(dtype, np.floating) for _, dtype in kept(DROPPED))


def test_sharding_by_rule_changes_nothing():
  model = _model('boundary', tied=True)
  rules = parallel.ShardingRules(parameters='replicated', sequence='whole')
  config = PipelineConfig(num_microbatches=2)
  _check(model, _pipelined(model, (2, 2, 2), config, rules), 1e-5)


def test_gradients_added_up_in_bfloat16_are_close_and_not_the_same():
  model = _model('boundary', tied=True)
  config = PipelineConfig(num_microbatches=2, gradient_dtype='bfloat16')
  ((loss, _), grads), _ = _pipelined(model, (2, 2, 1), config)
  (wanted_loss, _), wanted = _sequential(model)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
  errors = [
    float(np.abs(a - b).max() / np.abs(b).max())
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True)
  ]
  assert 1e-5 < max(errors) < 2e-2


def test_bfloat16_trains_on_every_axis():
  """Collectives in bfloat16 compile, and the loss is close to float32's."""
  model = _model('all_heads', tied=True, precision=Precision.BFLOAT16)
  config = PipelineConfig(num_microbatches=2, recompute='none')
  ((loss, _), grads), _ = _pipelined(model, (2, 2, 2), config)
  (wanted, _), _ = _sequential(_model('all_heads', tied=True))
  np.testing.assert_allclose(loss, wanted, rtol=2e-2)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_one_forward_one_backward_needs_no_more_memory_for_more_microbatches():
  """Twice the rows in twice the microbatches: the temporary memory of GPipe doubles."""
  model = _model('boundary', tied=True)
  mesh = parallel.make_mesh(parallel.MeshConfig(1, 2, 1), jax.devices()[:2])
  rules = parallel.ShardingRules()

  def temporary(schedule: str, num_microbatches: int) -> int:
    config = PipelineConfig(schedule=schedule, num_microbatches=num_microbatches)
    batch = jax.tree.map(lambda x: np.concatenate([x] * (num_microbatches // 8)), make_batch())
    with parallel.use(mesh, rules):
      pipelined = PipelinedObjective(
        model, mesh, rules, objective=_objective(model), pipeline=config
      )
      arguments = (_random_params(model), batch, np.ones(2, np.float32))
      program = jax.jit(pipelined.value_and_grad, compiler_options=QUICK).lower(*arguments)
      return program.compile().memory_analysis().temp_size_in_bytes

  kept = LENGTH * model.config.embed_dim * 4  # Of a microbatch by a stage.
  # The arrays of the batch themselves, weights of exits, and rows of the tables.
  given = LENGTH * 5 * 4 + 2 * 4 + 6 * 4
  assert temporary('1f1b', 32) - temporary('1f1b', 8) <= 24 * given
  assert temporary('gpipe', 32) - temporary('gpipe', 8) >= 24 * kept


@pytest.mark.parametrize(
  ('sizes', 'changes', 'words'),
  [
    ((1, 8, 1), {}, 'pipeline=8 is more than num_layers=4: choose at most 4 stages'),
    ((2, 2, 1), {'num_microbatches': 3}, 'num_microbatches=3 x data=2 does not divide the 8 rows'),
    ((1, 3, 1), {}, 'vocab_size=32 cannot be shared by pipeline x tensor = 3 devices'),
    ((1, 2, 1), {'layers_per_span': (3, 2)}, r'layers_per_span=\(3, 2\) must be 2 numbers'),
    ((1, 2, 1), {'layers_per_span': (4, 0)}, 'has a span without layers'),
    (
      (1, 2, 1),
      {'schedule': 'interleaved', 'num_chunks': 2, 'num_microbatches': 1},
      'num_microbatches=1 is not a multiple of the 2 stages',
    ),
  ],
)
def test_what_does_not_fit_is_named(sizes, changes, words):
  model = _model('none', tied=True)
  mesh = parallel.make_mesh(parallel.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
  with pytest.raises(UserError, match=words):
    pipelined = PipelinedObjective(
      model,
      mesh,
      parallel.ShardingRules(),
      objective=_objective(model),
      pipeline=PipelineConfig(**{'num_microbatches': 4, **changes}),
    )
    pipelined.check_rows(BATCH)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'schedule': 'zigzag'}, "'1f1b'"),
    ({'recompute': 'all'}, 'PipelineConfig.recompute'),
    ({'vocab': 'nowhere'}, 'PipelineConfig.vocab'),
    ({'gradient_dtype': 'float16'}, "choose 'float32' or 'bfloat16'"),
    ({'num_microbatches': 0}, 'num_microbatches=0 must be at least 1'),
  ],
)
def test_a_bad_configuration_is_named(changes, words):
  with pytest.raises(UserError, match=words):
    PipelineConfig(**changes)
