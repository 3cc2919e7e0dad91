"""Trees laid out by rule: initialisation, optimizer state, batches; one process and two."""

from __future__ import annotations

import itertools
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from exitax import parallel
from exitax.errors import UserError

RULES = parallel.ShardingRules()
FACTORISATIONS = [
  sizes
  for sizes in itertools.product((1, 2, 4, 8), repeat=3)
  if sizes[0] * sizes[1] * sizes[2] == 8
]
AXES = {
  'embed': {'kernel': ('vocab', 'embed')},
  'blocks': {'query': ('layers', 'embed', 'heads', 'kv'), 'key': P('layers', 'embed', 'kv_heads')},
  'norm': ('norm',),
}


def init(key):
  embed, query, key = jax.random.split(key, 3)
  return {
    'embed': {'kernel': jax.random.normal(embed, (32, 16)) * 0.02},
    'blocks': {
      'query': jax.random.truncated_normal(query, -2, 2, (3, 16, 8, 4)),
      'key': jax.nn.initializers.lecun_normal()(key, (3, 16, 2)),
    },
    'norm': jnp.ones((16,)),
  }


@pytest.mark.parametrize('sizes', FACTORISATIONS)
def test_sharded_init_is_bitwise_the_unsharded(sizes):
  mesh = parallel.make_mesh(parallel.MeshConfig(*sizes))
  one = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
  key = jax.random.key(3)
  want = parallel.init_sharded(init, key, AXES, one, RULES)
  got = parallel.init_sharded(init, key, AXES, mesh, RULES)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  # Newer XLA rounds differently by optimization level: the whole program on the same one.
  whole = jax.jit(init, compiler_options={'xla_backend_optimization_level': 1})(key)
  jax.tree.map(np.testing.assert_array_equal, want, whole)
  kernel = got['embed']['kernel']
  assert kernel.sharding.spec == P('tensor', 'data')
  assert kernel.addressable_shards[0].data.shape == (32 // sizes[2], 16 // sizes[0])


def test_no_device_computes_the_whole_parameter():
  mesh = parallel.make_mesh(parallel.MeshConfig(2, 1, 4))
  shardings = parallel.tree_shardings(jax.eval_shape(init, jax.random.key(0)), AXES, mesh, RULES)[
    'embed'
  ]['kernel']
  program = jax.jit(lambda key: init(key)['embed']['kernel'], out_shardings=shardings)
  text = program.lower(jax.random.key(0)).compile().as_text()
  assert 'f32[8,8]' in text
  assert 'f32[32,16]' not in text


def test_uneven_parameter_names_its_path():
  mesh = parallel.make_mesh(parallel.MeshConfig(tensor=3), jax.devices()[:3])
  with pytest.raises(UserError, match=r'^blocks/query: tensor=3 does not divide num_heads=8'):
    parallel.tree_shardings(
      {'blocks': {'query': jax.ShapeDtypeStruct((16, 8), 'float32')}},
      {'blocks': {'query': ('embed', 'heads')}},
      mesh,
      RULES,
    )


def test_what_is_recommended_divides_all_sizes():
  mesh = parallel.make_mesh(parallel.MeshConfig(tensor=3), jax.devices()[:3])
  shapes = {'mlp': (16, 512), 'query': (16, 6)}
  with pytest.raises(UserError, match=r'tensor=3 does not divide mlp_dim=512: choose 1 or 2$'):
    parallel.tree_shardings(
      {name: jax.ShapeDtypeStruct(shape, 'float32') for name, shape in shapes.items()},
      {'mlp': ('embed', 'mlp'), 'query': ('embed', 'heads')},
      mesh,
      RULES,
    )


def test_trees_that_differ_are_refused():
  mesh = parallel.make_mesh(parallel.MeshConfig())
  with pytest.raises(ValueError, match='key'):
    parallel.tree_shardings({'a': jnp.ones(8)}, {'b': ('embed',)}, mesh, RULES)


def test_optimizer_state_lies_as_its_parameters():
  mesh = parallel.make_mesh(parallel.MeshConfig(2, 1, 4))
  shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = parallel.tree_shardings(shapes, AXES, mesh, RULES)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = jax.eval_shape(optimizer.init, shapes)
  laid_out = parallel.shardings_like(state, shapes, shardings)
  assert jax.tree.structure(laid_out) == jax.tree.structure(state)
  assert laid_out[1][0].mu == shardings
  assert laid_out[1][0].nu == shardings
  assert laid_out[1][0].count.spec == P()


def test_longest_path_decides_and_other_shapes_are_replicated():
  mesh = parallel.make_mesh(parallel.MeshConfig())
  params = {'kernel': jnp.ones((8, 2)), 'norm': {'kernel': jnp.ones((8, 4))}}
  shardings = parallel.tree_shardings(
    params, {'kernel': ('embed', None), 'norm': {'kernel': (None, None)}}, mesh, RULES
  )
  state = {'mu': params, 'rows': {'kernel': jnp.ones((8,))}}
  laid_out = parallel.shardings_like(state, params, shardings)
  assert laid_out['mu'] == shardings
  assert laid_out['rows']['kernel'].spec == P()


@pytest.mark.parametrize('sizes', FACTORISATIONS)
def test_batch_rows_go_over_data(sizes):
  mesh = parallel.make_mesh(parallel.MeshConfig(*sizes))
  batch = {'tokens': np.arange(80, dtype=np.int32).reshape(8, 10), 'ids': np.arange(8)}
  got = parallel.shard_batch(batch, mesh, RULES)
  jax.tree.map(np.testing.assert_array_equal, got, batch)
  assert got['tokens'].sharding.shard_shape((8, 10)) == (8 // sizes[0], 10)


@pytest.mark.parametrize('batch_size', [0, 6])
def test_a_batch_size_that_does_not_spread_is_refused(batch_size):
  mesh = parallel.make_mesh(parallel.MeshConfig(4, 1, 2))
  parallel.check_batch_size(8, mesh, RULES)
  with pytest.raises(UserError, match=f'data=4 does not divide batch_size={batch_size}: choose'):
    parallel.check_batch_size(batch_size, mesh, RULES)


def test_batch_that_does_not_spread_is_refused():
  mesh = parallel.make_mesh(parallel.MeshConfig(4, 1, 2))
  with pytest.raises(UserError) as error:
    parallel.shard_batch({'tokens': np.zeros((6, 3))}, mesh, RULES)
  assert str(error.value) == 'data=4 does not divide batch_size=6: choose a multiple of 4'


def test_two_processes(subprocess_env):
  """Each process passes its rows (all of them where it shares them); sums see the whole batch."""
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  worker = pathlib.Path(__file__).with_name('two_processes.py')
  processes = [
    subprocess.Popen(
      [sys.executable, str(worker), str(port), str(index), '4,1,1', '2,1,2', '1,1,4'],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=subprocess_env,
    )
    for index in range(2)
  ]
  try:
    for process in processes:
      output, _ = process.communicate(timeout=120)
      assert process.returncode == 0, output
      for sizes in ((4, 1, 1), (2, 1, 2), (1, 1, 4)):
        assert f'mesh {sizes} ok' in output
      assert 'agreement ok' in output
  finally:
    for process in processes:
      process.kill()
