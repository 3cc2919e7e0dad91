"""One of two processes with two devices each; run by test_sharding.

Arguments: port of the coordinator, index of this process, then one or more
meshes 'data,pipeline,tensor'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax
import numpy as np

from exitax import parallel
from exitax.errors import UserError
from exitax.parallel import distributed


def main() -> None:
  """Joins the other process, then checks every mesh."""
  port, index, *meshes = sys.argv[1:]
  jax.config.update('jax_num_cpu_devices', 2)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=int(index))
  for sizes in meshes:
    config = parallel.MeshConfig(*(int(size) for size in sizes.split(',')))
    mesh = parallel.make_mesh(config)
    check_init(mesh)
    check_batch(mesh, int(index))
    print(f'mesh {mesh.devices.shape} ok')
  check_agreement(int(index))
  print('agreement ok')


def check_init(mesh: jax.sharding.Mesh) -> None:
  """This process's shards are pieces of what one device computes alone."""

  def init(key: jax.Array) -> dict[str, jax.Array]:
    return {'w': jax.random.normal(key, (8, 4))}

  key = jax.random.key(5)
  axes = {'w': ('vocab', 'embed')}
  params = parallel.init_sharded(init, key, axes, mesh, parallel.ShardingRules())
  # On the optimization level of `init_sharded`: newer XLA rounds differently by level.
  whole = jax.jit(init, compiler_options={'xla_backend_optimization_level': 1})
  want = np.asarray(whole(key)['w'])
  for shard in params['w'].addressable_shards:
    np.testing.assert_array_equal(shard.data, want[shard.index])


def check_batch(mesh: jax.sharding.Mesh, index: int) -> None:
  """A sum over the global batch sees the rows of both processes, once."""
  whole = np.arange(40.0).reshape(4, 10)
  own_rows = np.split(whole, 2)[index] if mesh.shape['data'] > 1 else whole
  batch = parallel.shard_batch({'tokens': own_rows}, mesh, parallel.ShardingRules())
  assert batch['tokens'].shape == (4, 10)
  assert float(jax.jit(lambda x: (x * x).sum())(batch['tokens'])) == (whole**2).sum()


def check_agreement(index: int) -> None:
  """What one process knows, both learn."""
  assert [parallel.any_process(flag) for flag in (False, index == 1, True)] == [False, True, True]
  assert parallel.from_main_process(10 + index) == 10
  assert parallel.do_together(lambda: index, part='counting') == index
  mesh = parallel.make_mesh(parallel.MeshConfig(4))
  spread = parallel.shard_batch(np.arange(2 * index, 2 * index + 2), mesh, parallel.ShardingRules())
  assert not spread.is_fully_addressable
  np.testing.assert_array_equal(parallel.fetch({'x': spread})['x'], np.arange(4))

  def fail() -> None:
    if index == 1:
      raise UserError('no disk')

  told = message_of(lambda: parallel.do_together(fail, part='its part'))
  assert told == (
    'no disk' if index else 'process 1 of 2 failed in its part: see the message of that process'
  )
  parallel.check_same('a', name='text', fix='mend it')
  told = message_of(lambda: parallel.check_same(f'a{index}', name='the text', fix='mend it'))
  assert told.startswith('the text of process 1 (') and told.endswith(': mend it')
  distributed._compare(['x = 1'])
  told = message_of(lambda: distributed._compare(['x = 1', f'y = {"long" * index}']))
  assert 'y is long on process 1 (' in told


def message_of(work: Callable[[], object]) -> str:
  """What a call complains of."""
  try:
    work()
  except UserError as error:
    return str(error)
  raise AssertionError('no error')


if __name__ == '__main__':
  main()
