"""The whole objective against autodiff through all logits, for every choice of matrices."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import models, objectives
from exitax.layers import HeadKind, Precision
from exitax.models import ExitConfig, ExitLM, ExitMatrix, ModelConfig
from exitax.objectives import ObjectiveConfig

QUICK = {'xla_backend_optimization_level': 0}
VOCAB, LENGTH = 13, 8
BASE = ModelConfig(
  vocab_size=VOCAB,
  num_layers=3,  # One scan: more layers cost no compilation.
  embed_dim=6,
  num_heads=2,
  head_dim=4,
  mlp_dim=8,
  max_length=LENGTH,
  precision=Precision.FLOAT64,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
  tokens: np.ndarray
  targets: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  weights: np.ndarray


def _batch() -> Batch:
  rng = np.random.default_rng(0)
  segment_ids = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
  positions = np.asarray([[0, 1, 2, 0, 1, 2, 3, 0], range(8)], np.int32)
  weights = (segment_ids > 0).astype(np.float32)
  weights[0, 2] = 0
  return Batch(
    tokens=rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32),
    targets=rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32),
    segment_ids=segment_ids,
    positions=positions,
    weights=weights,
  )


def _params(model: ExitLM):
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape)), shapes)


def _plain(model: ExitLM, params, batch: Batch, exit_weights, z_loss):
  logits = models.logits_at_exits(model, params, batch.tokens, batch.segment_ids, batch.positions)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  rows, places = np.indices(batch.targets.shape)
  nll = log_z - logits[:, rows, places, batch.targets]
  return jnp.einsum('e,ebl,bl->', exit_weights, nll + z_loss * log_z**2, batch.weights)


MATRICES = {
  'final and input': (ExitMatrix.FINAL, ExitMatrix.INPUT),
  'shared by both': (ExitMatrix.SHARED, ExitMatrix.SHARED),
  'own and final': (ExitMatrix.OWN, ExitMatrix.FINAL),
  'shared and own': (ExitMatrix.SHARED, ExitMatrix.OWN),
}


@pytest.mark.parametrize(
  ('matrices', 'tie_embeddings'),
  [
    ('final and input', True),
    ('final and input', False),
    ('shared by both', True),
    ('own and final', False),
    ('shared and own', False),
  ],
)
def test_loss_and_every_gradient_are_those_of_autodiff(x64, matrices, tie_embeddings):
  first, second = MATRICES[matrices]
  exits = (
    ExitConfig(layer=1, head=HeadKind.MLP, matrix=first),
    ExitConfig(layer=2, head=HeadKind.EMBEDDING, matrix=second),
  )
  model = ExitLM(dataclasses.replace(BASE, exits=exits, tie_embeddings=tie_embeddings))
  params, batch = _params(model), _batch()
  config = ObjectiveConfig(z_loss=0.01, chunk_length=4)
  exit_weights = jnp.asarray([0.25, 0.5, 1.0])

  def both(params):
    ours = lambda p: objectives.exit_objective(model, p, batch, exit_weights, config=config)  # noqa: E731
    plain = lambda p: _plain(model, p, batch, exit_weights, config.z_loss)  # noqa: E731
    return jax.value_and_grad(ours, has_aux=True)(params), jax.value_and_grad(plain)(params)

  ((loss, sums), grads), (wanted_loss, wanted) = jax.jit(both, compiler_options=QUICK)(params)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-12)
  assert float(sums.tokens) == batch.weights.sum() == 14
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  for (path, got), want in zip(
    jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted), strict=True
  ):
    name = jax.tree_util.keystr(path)
    assert np.abs(want).max() > 0, name
    np.testing.assert_allclose(
      got, want, rtol=0, atol=1e-10 * float(np.abs(want).max()), err_msg=name
    )


def test_exits_on_one_matrix_go_through_it_together():
  """One accumulator of the matrix's gradient for all of them, not one each."""
  exits = tuple(ExitConfig(layer=layer) for layer in (1, 2))
  model = ExitLM(dataclasses.replace(BASE, exits=exits, precision=Precision.FLOAT32))
  params = jax.tree.map(jnp.float32, _params(model))
  program = jax.make_jaxpr(
    jax.grad(
      lambda p: objectives.exit_objective(
        model, p, _batch(), jnp.ones(3), config=ObjectiveConfig(chunk_length=4)
      )[0]
    )
  )(params)
  scans = [
    equation
    for equation in program.jaxpr.eqns
    if equation.primitive.name == 'scan'
    and any(v.aval.shape == (VOCAB, 6) for v in equation.outvars)
  ]
  assert len(scans) == 1


def test_scores_are_means_over_all_batches():
  model = ExitLM(dataclasses.replace(BASE, exits=(ExitConfig(layer=2),)))
  parts = [
    objectives.LossSums(
      exits=objectives.ExitSums(
        nll=np.float32([6.0, 2.0]), log_z_squared=np.float32([0, 0]), correct=np.float32([1, 3])
      ),
      tokens=np.float32(3),
    ),
    objectives.LossSums(
      exits=objectives.ExitSums(
        nll=np.float32([4.0, 3.0]), log_z_squared=np.float32([0, 0]), correct=np.float32([0, 1])
      ),
      tokens=np.float32(2),
    ),
  ]
  total = objectives.add_sums(parts)
  assert total.exits.nll.dtype == np.float64
  shallow, final = objectives.exit_scores(model, total, bytes_per_token=4.0)
  assert (shallow.name, shallow.layer, shallow.nll, shallow.accuracy) == ('exit_2', 2, 2.0, 0.2)
  assert (final.name, final.layer, final.nll, final.accuracy) == ('final', 3, 1.0, 0.8)
  assert shallow.bits_per_byte == pytest.approx(2.0 / np.log(2) / 4)
  assert final.perplexity == pytest.approx(np.e)
  with pytest.raises(ValueError, match='no batches'):
    objectives.add_sums([])


def test_score_function_measures_each_exit(x64):
  model = ExitLM(dataclasses.replace(BASE, exits=(ExitConfig(layer=1),)))
  params, batch = _params(model), _batch()
  sums = jax.jit(objectives.make_score_fn(model), compiler_options=QUICK)(params, batch)
  for exit_index in range(2):
    one = jnp.zeros(2).at[exit_index].set(1.0)
    wanted = _plain(model, params, batch, one, 0.0)
    np.testing.assert_allclose(sums.exits.nll[exit_index], wanted, rtol=1e-10)
  logits = models.logits_at_exits(model, params, batch.tokens, batch.segment_ids, batch.positions)
  hits = (np.argmax(logits, -1) == batch.targets) * batch.weights
  np.testing.assert_array_equal(sums.exits.correct, hits.sum(axis=(1, 2)))


def test_anything_with_the_five_arrays_is_a_batch():
  model = ExitLM(dataclasses.replace(BASE, precision=Precision.FLOAT32))
  params = jax.tree.map(jnp.float32, _params(model))
  batch = _batch()
  loss, _ = objectives.exit_objective(
    model, params, SimpleNamespace(**vars(batch)), jnp.ones(1), config=ObjectiveConfig()
  )
  wanted = _plain(model, params, batch, jnp.ones(1), 0.0)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
