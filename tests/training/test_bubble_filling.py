"""Partial microbatches change which tokens an exit's loss is made of, and nothing else."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from exitax import data, models, objectives, parallel
from exitax.errors import UserError
from exitax.layers import Precision
from exitax.models import ExitConfig, ExitLM
from exitax.training import PipelineConfig, PipelinedObjective

LENGTH, STAGES = 8, 4
MODEL = ExitLM(
  models.ModelConfig(
    vocab_size=32,
    num_layers=8,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=LENGTH,
    # In the first stage, and where no extra comes.
    exits=(ExitConfig(layer=1), ExitConfig(layer=5)),
    precision=Precision.FLOAT64,
  )
)
OBJECTIVE = objectives.ObjectiveConfig(
  exit_weights=(objectives.ExitWeight(start=0.25), objectives.ExitWeight(start=0.5)),
  chunk_length=4,
  z_loss=1e-2,
)
# Four microbatches of one row, and two in the bubble.
FILLED = PipelineConfig(
  num_microbatches=4, vocab='stage', recompute='none', bubble_filling_ratio=2.0
)
ROWS = 6
QUICK = {'xla_backend_optimization_level': 0}


def _batch():
  rng = np.random.default_rng(0)
  tokens, targets = rng.integers(0, 32, (2, ROWS, LENGTH)).astype(np.int32)
  ones = np.ones((ROWS, LENGTH), np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  # Every row counts as many tokens: a mean of means is then the mean.
  return data.Batch(tokens, targets, ones, positions, ones.astype(np.float32))


def _params():
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    return (path[-1].key == 'scale') + 0.2 * rng.normal(size=leaf.shape)

  return jax.tree.map_with_path(draw, MODEL.abstract_params())


def _sequential(batch, weights):
  """Gradient of a weighted sum of the exits' mean losses over the rows of the batch."""

  def loss(params):
    return objectives.exit_objective(
      MODEL, params, batch, jax.numpy.asarray(weights), config=OBJECTIVE
    )

  step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
  (value, sums), grads = jax.device_get(step(_params()))
  return value / sums.tokens, jax.tree.map(lambda g: g / sums.tokens, grads)


@pytest.fixture(scope='module')
def step():
  with jax.enable_x64(True):
    mesh = parallel.make_mesh(parallel.MeshConfig(1, STAGES, 2), jax.devices()[: 2 * STAGES])
    rules = parallel.ShardingRules()
    with parallel.use(mesh, rules):
      pipelined = PipelinedObjective(MODEL, mesh, rules, objective=OBJECTIVE, pipeline=FILLED)
      program = jax.jit(pipelined.value_and_grad, compiler_options=QUICK)
    assert pipelined.schedule.extra_depths == (1, 1)

    def run(batch):
      with parallel.use(mesh, rules):
        params = _params()
        layout = parallel.tree_shardings(params, MODEL.logical_axes(), mesh, rules)
        arguments = jax.block_until_ready(
          (
            jax.device_put(params, layout),
            parallel.shard_batch(batch, mesh, rules),
            OBJECTIVE.weights_at(0),
          )
        )
        (value, sums), grads = jax.device_get(jax.block_until_ready(program(*arguments)))
      return value / sums.tokens, jax.tree.map(lambda g: g / sums.tokens, grads), sums

    yield run


def _close(got, wanted, tolerance=1e-10):
  for (path, left), right in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(
      left, right, rtol=0, atol=tolerance * np.abs(right).max(), err_msg=name
    )


def _rows(batch, rows):
  return jax.tree.map(lambda x: x[np.asarray(rows)], batch)


@pytest.mark.slow
def test_every_exit_is_a_mean_over_what_it_saw(x64, step):
  """The exit of the first stage over all six rows, all others over the first four."""
  value, grads, sums = step(_batch())
  weights = np.asarray(OBJECTIVE.weights_at(0))
  first, others = weights * [1, 0, 0], weights * [0, 1, 1]
  value_first, grads_first = _sequential(_batch(), first)
  value_others, grads_others = _sequential(_rows(_batch(), range(4)), others)
  np.testing.assert_allclose(value, value_first + value_others, rtol=1e-12)
  _close(grads, jax.tree.map(np.add, grads_first, grads_others))
  assert sums.tokens == ROWS * LENGTH


@pytest.mark.slow
def test_the_gradient_is_unbiased(x64, step):
  """Over all rotations every row is an extra as often: the mean gradient is the whole batch's."""
  batch = _batch()
  found = [step(_rows(batch, np.roll(np.arange(ROWS), shift))) for shift in range(ROWS)]
  mean = jax.tree.map(lambda *grads: sum(grads) / ROWS, *(grads for _, grads, _ in found))
  value, grads = _sequential(batch, np.asarray(OBJECTIVE.weights_at(0)))
  np.testing.assert_allclose(np.mean([v for v, _, _ in found]), value, rtol=1e-12)
  _close(mean, grads)
  # Each of them alone is another: the test would see a bias.
  assert (
    max(
      np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found[0][1], grads)), strict=True)
    )
    > 1e-4
  )


@pytest.mark.parametrize(
  ('changes', 'exits', 'message'),
  [
    ({'vocab': 'pipeline'}, (1,), "bubble_filling_ratio needs vocab='stage'"),
    ({'schedule': 'gpipe'}, (1,), "bubbles of 'gpipe' are not filled"),
    ({'bubble_filling_ratio': 0.5}, (1,), 'is below 1'),
    ({}, (3,), 'reaches an exit: place an exit no later than after layer 1, or set it to 0'),
    ({}, (), 'no microbatch fits the bubble of 4 stages and reaches an exit'),
  ],
)
def test_what_cannot_be_filled(changes, exits, message):
  config = models.ModelConfig(
    vocab_size=32,
    num_layers=8,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=LENGTH,
    exits=tuple(ExitConfig(layer=layer) for layer in exits),
  )
  objective = objectives.ObjectiveConfig(
    exit_weights=tuple(objectives.ExitWeight(start=0.5) for _ in exits)
  )
  mesh = parallel.make_mesh(parallel.MeshConfig(1, 4, 1), jax.devices()[:4])
  pipeline = PipelineConfig(
    **{'num_microbatches': 4, 'vocab': 'stage', 'bubble_filling_ratio': 2.0} | changes
  )
  with pytest.raises(UserError, match=message):
    PipelinedObjective(
      ExitLM(config), mesh, parallel.ShardingRules(), objective=objective, pipeline=pipeline
    )
