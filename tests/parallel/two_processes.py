"""One of two processes with two devices each; run by test_sharding.

Arguments: port of the coordinator, index of this process, mesh sizes 'data,pipeline,tensor'.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from exitax import parallel


def main() -> None:
  port, index, sizes = sys.argv[1], int(sys.argv[2]), sys.argv[3]
  jax.config.update('jax_num_cpu_devices', 2)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=index)
  mesh = parallel.make_mesh(parallel.MeshConfig(*(int(size) for size in sizes.split(','))))
  rules = parallel.ShardingRules()

  key = jax.random.key(5)
  params = parallel.init_sharded(
    lambda key: {'w': jax.random.normal(key, (8, 4))}, key, {'w': ('vocab', 'embed')}, mesh, rules
  )
  want = np.asarray(jax.jit(lambda key: jax.random.normal(key, (8, 4)))(key))
  for shard in params['w'].addressable_shards:
    np.testing.assert_array_equal(shard.data, want[shard.index])

  whole = np.arange(40.0).reshape(4, 10)
  own_rows = np.split(whole, 2)[index] if mesh.shape['data'] > 1 else whole
  batch = parallel.shard_batch({'tokens': own_rows}, mesh, rules)
  assert batch['tokens'].shape == (4, 10)
  assert float(jax.jit(lambda x: (x * x).sum())(batch['tokens'])) == (whole**2).sum()
  print('ok')


if __name__ == '__main__':
  main()
