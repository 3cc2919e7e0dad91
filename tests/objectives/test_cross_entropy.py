"""The sliced loss and its own gradient, against autodiff through all logits at once."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import objectives
from exitax.layers import Precision, platform

EXITS, BATCH, LENGTH, EMBED, VOCAB = 3, 2, 12, 5, 11


def _arrays(dtype: Any = np.float64) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  weights = rng.random((BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) < 0.7)
  assert (weights == 0).any()
  return {
    'features': rng.normal(size=(EXITS, BATCH, LENGTH, EMBED)).astype(dtype),
    'matrix': rng.normal(size=(VOCAB, EMBED)).astype(dtype),
    'targets': rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
    'token_weights': weights.astype(dtype),
    'exit_weights': np.asarray([0.25, 0.0, 1.0], dtype),
  }


def _plain(arrays, z_loss):
  """All logits at once, by log_softmax."""
  logits = jnp.einsum('ebld,vd->eblv', arrays['features'], arrays['matrix'])
  log_p = jax.nn.log_softmax(logits)
  targets = jnp.broadcast_to(arrays['targets'], logits.shape[:-1])
  nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  log_z = jax.nn.logsumexp(logits, axis=-1)

  def total(x):
    return jnp.sum(arrays['token_weights'] * x, axis=(1, 2))

  correct = total((jnp.argmax(logits, -1) == targets).astype(nll.dtype))
  sums = objectives.ExitSums(nll=total(nll), log_z_squared=total(log_z**2), correct=correct)
  return jnp.sum(arrays['exit_weights'] * (sums.nll + z_loss * sums.log_z_squared)), sums


def _sliced(arrays, z_loss, chunk_length, precision=Precision.FLOAT64):
  return objectives.exit_cross_entropy(
    *(arrays[name] for name in ('features', 'matrix', 'targets', 'token_weights', 'exit_weights')),
    z_loss,
    chunk_length,
    precision,
  )


def _gradient_fn(loss_fn, arrays):
  def of(features, matrix):
    # A cotangent other than 1: the saved gradients must be scaled by it.
    loss, sums = loss_fn({**arrays, 'features': features, 'matrix': matrix})
    return -3.0 * loss, sums

  return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)


def _gradients(loss_fn, arrays):
  gradients = _gradient_fn(loss_fn, arrays)
  program = jax.jit(gradients, compiler_options={'xla_backend_optimization_level': 0})
  return program(arrays['features'], arrays['matrix'])


# 5 does not divide 12: the next divisor below, 4, is taken. 100 is more than there is.
@pytest.mark.parametrize(
  ('chunk_length', 'z_loss'), [(1, 0.1), (4, 0.0), (5, 0.1), (12, 0.1), (100, 0.0)]
)
def test_loss_sums_and_gradients_are_those_of_autodiff(x64, chunk_length, z_loss):
  arrays = _arrays()
  (loss, sums), grads = _gradients(lambda a: _sliced(a, z_loss, chunk_length), arrays)
  (wanted_loss, wanted_sums), wanted_grads = _gradients(lambda a: _plain(a, z_loss), arrays)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-12)
  for got, wanted in zip(jax.tree.leaves(sums), jax.tree.leaves(wanted_sums), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
  for got, wanted in zip(grads, wanted_grads, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10 * float(jnp.abs(wanted).max()))


def test_without_gradients_the_value_is_the_same(x64):
  arrays = _arrays()
  loss, sums = _sliced(arrays, 0.1, 4)
  (with_gradients, other_sums), _ = _gradients(lambda a: _sliced(a, 0.1, 4), arrays)
  np.testing.assert_allclose(-3 * loss, with_gradients, rtol=1e-14)
  np.testing.assert_array_equal(sums.nll, other_sums.nll)


def test_tokens_of_weight_zero_do_nothing(x64):
  arrays = _arrays()
  left_out = arrays['token_weights'] == 0
  (loss, _), (d_features, d_matrix) = _gradients(lambda a: _sliced(a, 0.1, 4), arrays)
  assert (np.asarray(d_features)[:, left_out] == 0).all()
  changed = {
    **arrays,
    'targets': np.where(left_out, (arrays['targets'] + 1) % VOCAB, arrays['targets']),
    'features': np.where(left_out[None, ..., None], 50.0, arrays['features']),
  }
  (loss_after, _), (_, d_matrix_after) = _gradients(lambda a: _sliced(a, 0.1, 4), changed)
  assert loss_after == loss
  np.testing.assert_allclose(d_matrix_after, d_matrix, atol=1e-12)


def test_an_exit_of_weight_zero_gets_no_gradient_but_is_measured(x64):
  arrays = _arrays()
  (_, sums), (d_features, _) = _gradients(lambda a: _sliced(a, 0.0, 4), arrays)
  assert (d_features[1] == 0).all()
  assert (d_features[0] != 0).any()
  assert sums.nll[1] > 0


def test_a_batch_without_counted_tokens_is_zero():
  arrays = _arrays(np.float32)
  arrays['token_weights'] = np.zeros_like(arrays['token_weights'])
  (loss, sums), grads = _gradients(lambda a: _sliced(a, 0.1, 4, Precision.FLOAT32), arrays)
  assert loss == 0
  assert all((x == 0).all() for x in jax.tree.leaves((sums, grads)))


def test_huge_logits_do_not_overflow():
  arrays = _arrays(np.float32)
  arrays['features'] *= 1e4
  (loss, _), grads = _gradients(lambda a: _sliced(a, 0.0, 4, Precision.FLOAT32), arrays)
  assert all(np.isfinite(x).all() for x in (loss, *grads))
  wanted, _ = _plain(arrays, 0.0)
  np.testing.assert_allclose(loss, -3 * wanted, rtol=1e-4)


def test_bfloat16_follows_float32():
  arrays = _arrays(np.float32)
  (loss, _), grads = _gradients(lambda a: _sliced(a, 1e-2, 4, Precision.BFLOAT16), arrays)
  (wanted_loss, _), wanted = _gradients(lambda a: _plain(a, 1e-2), arrays)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-2)
  for got, want in zip(grads, wanted, strict=True):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.02 * float(np.abs(want).max()))


def test_axes_that_stay_apart_change_nothing(x64, monkeypatch):
  """Under a mesh, batch and length are not merged into one axis of tokens."""
  arrays = _arrays()
  merged = _gradients(lambda a: _sliced(a, 0.1, 4), arrays)
  monkeypatch.setattr(platform, 'partitioned', lambda: True)
  assert not platform.merges_axes(jnp.float64)
  apart = _gradients(lambda a: _sliced(a, 0.1, 4), arrays)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), merged, apart)


def _all_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
  """Shapes of every value of a program, loops' bodies included."""
  shapes = []
  for equation in jaxpr.eqns:
    shapes += [v.aval.shape for v in equation.outvars if hasattr(v.aval, 'shape')]
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      shapes += _all_shapes(inner)
  return shapes


@pytest.mark.parametrize('chunk_length', [3, LENGTH])
def test_logits_of_a_slice_alone_are_alive(chunk_length):
  arrays = _arrays(np.float32)
  loss_fn = lambda a: _sliced(a, 0.1, chunk_length, Precision.FLOAT32)  # noqa: E731
  program = jax.make_jaxpr(_gradient_fn(loss_fn, arrays))(arrays['features'], arrays['matrix'])
  with_vocabulary = [
    shape for shape in _all_shapes(program.jaxpr) if VOCAB in shape and shape != (VOCAB, EMBED)
  ]
  assert max(map(math.prod, with_vocabulary)) == BATCH * chunk_length * VOCAB


def _taught(arrays, shares):
  rng = np.random.default_rng(5)
  return objectives.Teacher(
    features=rng.normal(size=(BATCH, LENGTH, EMBED)),
    matrix=rng.normal(size=(VOCAB, EMBED)),
    shares=np.asarray(shares),
  )


def _plain_taught(arrays, z_loss, teacher):
  """Cross-entropy with the mixture of target and teacher, all logits at once."""
  logits = jnp.einsum('ebld,vd->eblv', arrays['features'], arrays['matrix'])
  of_teacher = jax.nn.softmax(jnp.einsum('bld,vd->blv', teacher.features, teacher.matrix))
  share = teacher.shares[:, None, None, None]
  target = (1 - share) * jax.nn.one_hot(arrays['targets'], VOCAB) + share * of_teacher
  losses = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
  losses += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
  total = jnp.sum(arrays['token_weights'] * losses, axis=(1, 2))
  return jnp.sum(arrays['exit_weights'] * total), None


@pytest.mark.parametrize('merges', [True, False])
@pytest.mark.parametrize('chunk_length', [1, 4, 12])
def test_exits_learn_from_a_teacher(x64, monkeypatch, chunk_length, merges):
  monkeypatch.setattr(platform, 'merges_axes', lambda dtype: merges)
  arrays = {**_arrays(), 'exit_weights': np.asarray([0.25, 0.5, 1.0])}
  teacher = _taught(arrays, [0.3, 1.0, 0.0])
  names = ('features', 'matrix', 'targets', 'token_weights', 'exit_weights')

  def sliced(a):
    return objectives.exit_cross_entropy(
      *(a[name] for name in names), 0.1, chunk_length, Precision.FLOAT64, None, teacher
    )

  (loss, sums), grads = _gradients(sliced, arrays)
  (wanted_loss, _), wanted = _gradients(lambda a: _plain_taught(a, 0.1, teacher), arrays)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-12)
  for found, leaf in zip(grads, wanted, strict=True):
    np.testing.assert_allclose(found, leaf, rtol=1e-10, atol=1e-12)
  # What is reported is about the text.
  plain = _sliced(arrays, 0.1, chunk_length)[1]
  np.testing.assert_allclose(sums.nll, plain.nll, rtol=1e-12)


def test_a_teacher_without_a_share_changes_nothing(x64):
  arrays = _arrays()
  names = ('features', 'matrix', 'targets', 'token_weights', 'exit_weights')
  teacher = _taught(arrays, [0.0, 0.0, 0.0])
  taught = objectives.exit_cross_entropy(
    *(arrays[name] for name in names), 0.1, 4, Precision.FLOAT64, None, teacher
  )
  plain = _sliced(arrays, 0.1, 4)
  np.testing.assert_allclose(taught[0], plain[0], rtol=1e-13)
