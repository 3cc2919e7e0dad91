"""Flop counts against hand counts: 2 per multiply-add, times every trip around it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from exitax import parallel

N = 4
SQUARE = jax.ShapeDtypeStruct((N, N), 'float32')
MATMUL = 2 * N**3


def flops(fn, *args) -> int:
  count = parallel.count_flops(fn, *args)
  assert count.num_open_loops == 0
  return count.flops


def test_dot_general_with_batch_and_two_contracted_dimensions():
  a = jax.ShapeDtypeStruct((3, 5, 7, 2), 'float32')
  b = jax.ShapeDtypeStruct((3, 7, 2, 11), 'float32')
  assert flops(lambda a, b: jnp.einsum('bijk,bjkl->bil', a, b), a, b) == 2 * 3 * 5 * 7 * 2 * 11


def test_nested_scans_multiply():
  def layer(x, _):
    return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)

  assert flops(lambda x: jax.lax.scan(lambda x, _: layer(x, None), x, None, length=5), SQUARE) == (
    15 * MATMUL
  )


def test_fori_loop_with_known_bounds():
  assert flops(lambda x: jax.lax.fori_loop(0, 6, lambda _, x: x @ x, x), SQUARE) == 6 * MATMUL


def test_open_while_loop_is_a_lower_bound():
  def until_large(x):
    return jax.lax.while_loop(lambda x: (x @ x).sum() < 9, lambda x: x @ x @ x, x)

  count = parallel.count_flops(until_large, SQUARE)
  assert count == parallel.FlopCount(flops=3 * MATMUL, num_open_loops=1)


def test_while_loop_without_flops_is_exact():
  assert flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), SQUARE) == 0


def test_cond_costs_its_dearest_branch():
  branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x @ x]
  assert flops(lambda i, x: jax.lax.switch(i, branches, x), jnp.int32(0), SQUARE) == 3 * MATMUL


def test_jit_is_entered():
  assert flops(jax.jit(lambda x: jax.jit(lambda x: x @ x)(x) @ x), SQUARE) == 2 * MATMUL


def test_checkpoint_counts_recomputation():
  def loss(w, x):
    return jnp.sum(jnp.sin(x @ w) @ w)

  plain = flops(jax.grad(loss), SQUARE, SQUARE)
  remat = flops(jax.grad(jax.checkpoint(loss)), SQUARE, SQUARE)
  # Plain: x @ w, then dW and dX of the second product, dW of the first. The second product itself
  # feeds only the loss, which grad drops. Recomputation adds x @ w once, as the first pass is
  # dropped with the loss.
  assert plain == 4 * MATMUL
  assert remat == 4 * MATMUL
  both = flops(jax.value_and_grad(jax.checkpoint(loss)), SQUARE, SQUARE)
  assert both == 6 * MATMUL


def test_custom_vjp_forward_and_backward():
  @jax.custom_vjp
  def product(a, b):
    return a @ b

  product.defvjp(lambda a, b: (a @ b, (a, b)), lambda ab, g: (g @ ab[1].T, ab[0].T @ g))
  assert flops(product, SQUARE, SQUARE) == MATMUL
  loss = lambda a, b: jnp.sum(product(a, b) ** 2)  # noqa: E731
  assert flops(jax.grad(loss, argnums=(0, 1)), SQUARE, SQUARE) == 3 * MATMUL


def test_unused_results_cost_nothing():
  def scanned(x):
    _, unused = jax.lax.scan(lambda x, _: (x + 1, x @ x), x, None, length=3)
    del unused
    return x

  assert flops(scanned, SQUARE) == 0


def test_training_step_of_a_two_layer_network():
  """The 6 N T rule, less the gradient towards the input, which nobody asks for."""

  def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params[0]) @ params[1])

  params = [jax.ShapeDtypeStruct((8, 16), 'float32'), jax.ShapeDtypeStruct((16, 4), 'float32')]
  x = jax.ShapeDtypeStruct((32, 8), 'float32')
  first, second = 2 * 32 * 8 * 16, 2 * 32 * 16 * 4
  assert flops(jax.value_and_grad(loss), params, x) == 2 * first + 3 * second


def test_shard_map_is_counted_over_all_shards():
  mesh = parallel.make_mesh(parallel.MeshConfig(2, 1, 4))
  fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P('data'), P()), out_specs=P('data'))
  x = jax.ShapeDtypeStruct((8, N), 'float32')
  # The product is over every device: the four tensor shards repeat the work.
  assert flops(fn, x, SQUARE) == 4 * 2 * 8 * N * N


@pytest.mark.parametrize(('groups', 'expected'), [(1, 2 * 10 * 6 * 3 * 4), (2, 2 * 10 * 6 * 3 * 2)])
def test_convolution(groups, expected):
  x = jax.ShapeDtypeStruct((1, 4, 12), 'float32')
  kernel = jax.ShapeDtypeStruct((6, 4 // groups, 3), 'float32')
  conv = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1,),
    padding='VALID',
    feature_group_count=groups,
  )
  assert flops(conv, x, kernel) == expected


def test_ragged_dot():
  x, w = jax.ShapeDtypeStruct((6, N), 'float32'), jax.ShapeDtypeStruct((2, N, 5), 'float32')
  assert flops(jax.lax.ragged_dot, x, w, jnp.array([2, 4])) == 2 * 6 * N * 5


def test_pallas_kernel_runs_once_per_grid_point():
  def kernel(x, out):
    out[...] = x[...] @ x[...]

  block = pl.BlockSpec((N, N), lambda i: (i, 0))
  shape = jax.ShapeDtypeStruct((3 * N, N), 'float32')
  call = pl.pallas_call(
    kernel, out_shape=shape, grid=(3,), in_specs=[block], out_specs=block, interpret=True
  )
  assert flops(call, shape) == 3 * MATMUL
