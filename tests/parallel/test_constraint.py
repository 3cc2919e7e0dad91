"""Layout hints: placed under a mesh, absent from the program without one, never stale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from exitax import parallel
from exitax.errors import UserError

AXES = ('batch', 'activation_length', 'activation_embed')
MESH = parallel.MeshConfig(2, 1, 4)


def double(x):
  return parallel.constrain(x * 2, AXES)


def constraints_in(fn, x) -> int:
  return str(jax.make_jaxpr(fn)(x)).count('sharding_constraint')


def test_no_op_outside_and_on_one_device():
  x = jnp.ones((4, 8, 2))
  one = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
  assert constraints_in(double, x) == 0
  with parallel.use(one, parallel.ShardingRules()):
    assert constraints_in(double, x) == 0
  with parallel.use(parallel.make_mesh(MESH), parallel.ShardingRules()):
    assert constraints_in(double, x) == 1
  assert parallel.current_rules() is None


def test_output_is_laid_out_and_equal():
  x = np.arange(64.0).reshape(4, 8, 2)
  with parallel.use(parallel.make_mesh(MESH), parallel.ShardingRules()):
    out = jax.jit(double)(x)
  assert out.sharding.spec == P('data', 'tensor')
  assert out.addressable_shards[0].data.shape == (2, 2, 2)
  np.testing.assert_array_equal(out, x * 2)


def test_other_rules_on_the_same_mesh_trace_again():
  mesh, fn, x = parallel.make_mesh(MESH), jax.jit(double), jnp.ones((4, 8, 2))
  specs = []
  for sequence in ('tensor', 'whole', 'tensor'):
    with parallel.use(mesh, parallel.ShardingRules(sequence=sequence)):
      specs.append(fn(x).sharding.spec)
  assert specs == [P('data', 'tensor'), P('data'), P('data', 'tensor')]
  assert len(fn(x).sharding.device_set) == 1


def test_uneven_activations_stay_whole():
  with parallel.use(parallel.make_mesh(MESH), parallel.ShardingRules()):
    out = jax.jit(double)(jnp.ones((1, 8, 2)))
  assert out.sharding.spec == P(None, 'tensor')


def test_gradient_and_vmap_pass_through():
  x = jnp.arange(3 * 64.0).reshape(3, 4, 8, 2)
  with parallel.use(parallel.make_mesh(MESH), parallel.ShardingRules()):
    grad = jax.jit(jax.grad(lambda x: (jax.vmap(double)(x) ** 2).sum()))(x)
  np.testing.assert_allclose(grad, 8 * x)


def test_manual_axes_are_left_out():
  mesh = parallel.make_mesh(parallel.MeshConfig(2, 2, 2))
  x = jnp.arange(2 * 4 * 8 * 2.0).reshape(8, 8, 2)

  def stage(shard):
    return parallel.constrain(shard * 2, ('stage', 'activation_length', None))

  with parallel.use(mesh, parallel.ShardingRules()):
    spec = P('pipeline')
    run = jax.shard_map(stage, in_specs=spec, out_specs=spec, axis_names={'pipeline'})
    out = jax.jit(run)(x)
  np.testing.assert_array_equal(out, x * 2)


def test_wrong_names_show_on_one_device_too():
  one = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
  with parallel.use(one, parallel.ShardingRules()):
    with pytest.raises(UserError, match="'hidden' is in no sharding rule"):
      parallel.constrain(jnp.ones((2,)), ('hidden',))
    with pytest.raises(UserError, match='both map to mesh axis'):
      parallel.constrain(jnp.ones((2, 2)), ('heads', 'mlp'))
  with pytest.raises(ValueError, match='needs 2 axes'):
    parallel.constrain(jnp.ones((2, 2)), ('batch',))
