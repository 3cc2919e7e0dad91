"""The executor on a toy: any table gives the gradients of the whole, and keeps no more than it says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from exitax import parallel
from exitax.parallel import Keep, StageProgram, schedule
from exitax.parallel.residuals import residuals_of

LAYERS, WIDTH, MICROBATCHES = 8, 5, 8


def _layer(kernel, hidden):
  return jnp.tanh(hidden @ kernel)


def _span(kernels, hidden):
  return jax.lax.scan(lambda hidden, kernel: (_layer(kernel, hidden), None), hidden, kernels)[0]


def _stage_fn(params, shared, hidden, microbatch, span):
  hidden = jnp.where(span == 0, microbatch['x'] @ shared['in'], hidden)
  return _span(params, hidden), hidden


def _loss_of(taps, shared, y):
  return jnp.sum(jnp.square(taps @ shared['out'] - y))


def _loss_fn(shared, taps, microbatch, span, counts):
  """Every span has an exit at its beginning, weighted by its number."""
  loss = counts * (1.0 + span) * _loss_of(taps, shared, microbatch['y'])
  return loss, loss


PROGRAM = StageProgram(
  stage_fn=_stage_fn,
  loss_fn=_loss_fn,
  hidden_like=lambda microbatch: jax.ShapeDtypeStruct((3, WIDTH), jnp.float32),
)


@functools.cache
def _inputs():
  rng = np.random.default_rng(0)
  kernels = rng.normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32) / np.sqrt(WIDTH)
  shared = {name: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ('in', 'out')}
  data = {name: rng.normal(size=(MICROBATCHES, 3, WIDTH)).astype(np.float32) for name in 'xy'}
  return kernels, shared, data


@functools.cache
def _oracle(num_spans):
  """Loss and gradients of the model in one piece."""
  kernels, shared, data = _inputs()

  def loss(kernels, shared):
    hidden, total = data['x'] @ shared['in'], 0.0
    for span, part in enumerate(jnp.split(kernels, num_spans)):
      total += (1.0 + span) * _loss_of(hidden, shared, data['y'])
      hidden = _span(part, hidden)
    return total

  return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(kernels, shared))


def _run(table, keep=Keep.INPUTS):
  mesh = parallel.make_mesh(
    parallel.MeshConfig(1, table.num_stages, 1), jax.devices()[: table.num_stages]
  )
  kernels, shared, data = _inputs()
  shape = (table.num_chunks, table.num_stages, -1, WIDTH, WIDTH)
  stages = kernels.reshape(shape).swapaxes(0, 1)

  def stage(params, shared, data):
    result = parallel.run_pipeline(
      PROGRAM, table, params[0], shared, data, axis='pipeline', keep=keep
    )
    sums = jax.lax.psum(result.sums, 'pipeline')
    if result.params is None:
      return sums, None, None
    return sums, result.params[None], jax.lax.psum(result.shared, 'pipeline')

  cut, whole = PartitionSpec('pipeline'), PartitionSpec()
  run = jax.shard_map(
    stage,
    mesh=mesh,
    in_specs=(cut, whole, whole),
    out_specs=(whole, cut, whole),
    axis_names={'pipeline'},
    check_vma=False,
  )
  loss, params, shared = jax.device_get(jax.jit(run)(stages, shared, data))
  return loss, None if params is None else params.swapaxes(0, 1).reshape(kernels.shape), shared


CASES = [
  ('gpipe', 1, 1),
  ('1f1b', 1, 1),
  ('gpipe', 4, 1),
  ('1f1b', 2, 1),
  ('1f1b', 8, 1),
  ('interleaved', 2, 1),
  ('interleaved', 2, 4),
  ('interleaved', 4, 2),
]


@pytest.mark.parametrize('keep', Keep)
@pytest.mark.parametrize(('kind', 'stages', 'chunks'), CASES)
def test_gradients_are_those_of_the_whole(kind, stages, chunks, keep):
  table = schedule.make_schedule(
    kind, num_stages=stages, num_microbatches=MICROBATCHES, num_chunks=chunks
  )
  loss, params, shared = _run(table, keep)
  wanted_loss, (wanted_params, wanted_shared) = _oracle(stages * chunks)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
  np.testing.assert_allclose(params, wanted_params, rtol=0, atol=1e-6 * np.abs(wanted_params).max())
  for name, wanted in wanted_shared.items():
    np.testing.assert_allclose(shared[name], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(('stages', 'chunks'), [(1, 1), (4, 1), (2, 2)])
def test_evaluation_gives_the_same_loss_and_no_gradients(stages, chunks):
  table = schedule.forward_schedule(
    num_stages=stages, num_microbatches=MICROBATCHES, num_chunks=chunks
  )
  loss, params, _ = _run(table)
  np.testing.assert_allclose(loss, _oracle(stages * chunks)[0], rtol=1e-6)
  assert params is None


def test_residuals_leave_out_what_does_not_depend_on_the_activations():
  """Neither weights, nor casts of them, nor anything made of other inputs alone."""
  kernels, _, data = _inputs()

  def fn(kernels, mask, hidden):
    low = kernels.astype(jnp.bfloat16)

    def layer(hidden, kernel):
      return jnp.tanh(hidden @ kernel.astype(jnp.float32)) * jnp.cos(mask), None

    return jax.lax.scan(layer, hidden, low)[0]

  mask, hidden = np.ones((3, WIDTH), np.float32), data['x'][0]
  out, residuals = residuals_of(fn, kernels, mask, hidden)
  # Another program, which may round the last bit differently.
  np.testing.assert_allclose(out, fn(kernels, mask, hidden), rtol=2e-6, atol=0)
  shapes = [x.shape for x in residuals]
  assert shapes
  assert all(shape == (LAYERS, 3, WIDTH) for shape in shapes), shapes


def test_rebuilt_pullback_computes_nothing_again():
  kernels, shared, data = _inputs()
  microbatch = {name: x[0] for name, x in data.items()}

  def stage_fn(params, hidden):
    return _stage_fn(params, shared, hidden, microbatch, jnp.int32(1))[0]

  hidden = jax.ShapeDtypeStruct((3, WIDTH), jnp.float32)
  residuals = jax.eval_shape(lambda k, h: residuals_of(stage_fn, k, h)[1], kernels, hidden)

  def backward(kernels, residuals, gradient):
    from exitax.parallel.residuals import rebuild_pullback

    pull_back = rebuild_pullback(stage_fn, residuals, kernels, jnp.zeros((3, WIDTH)))
    return pull_back(gradient)

  product = 2 * 3 * WIDTH * WIDTH
  forward = parallel.count_flops(stage_fn, kernels, hidden).flops
  assert forward == LAYERS * product
  assert parallel.count_flops(backward, kernels, residuals, hidden).flops == 2 * forward
