"""Two real processes share one checkpoint."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# argv: index of the process, port, directory.
PROGRAM = """
import json, sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=index)
from exitax import checkpoint
from exitax.checkpoint import commit

wide = Mesh(np.array(jax.devices()).reshape(4), ('data',))
square = Mesh(np.array(jax.devices()).reshape(2, 2), ('data', 'tensor'))
values = np.arange(64, dtype=np.float32).reshape(8, 8)

def state(mesh, spec):
  make = jax.jit(
    lambda: {'params': {'w': jax.numpy.asarray(values)}, 'key': jax.random.key(7)},
    out_shardings={'params': {'w': NamedSharding(mesh, spec)}, 'key': NamedSharding(mesh, P())},
  )
  return make()

with checkpoint.CheckpointManager(directory) as manager:
  manager.save(1, state(wide, P('data')), extras={'position': 10 + index}, metrics={'loss': 2.0})
  manager.wait()
  other = jax.eval_shape(lambda: state(square, P('data')))
  other = {
    'params': {'w': jax.ShapeDtypeStruct(
      (8, 8), np.float32, sharding=NamedSharding(square, P('tensor', 'data')))},
    'key': jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(square, P())),
  }
  restored = manager.restore(other)
  same = all(
    np.array_equal(shard.data, values[shard.index])
    for shard in restored.state['params']['w'].addressable_shards
  )
  key_data = jax.random.key_data(restored.state['key']).addressable_shards[0].data
  report = {
    'same': same,
    'key': np.array_equal(key_data, jax.random.key_data(jax.random.key(7))),
    'position': restored.extras['position'],
    'all': [extras['position'] for extras in restored.info.process_extras],
  }

  def full(plan):
    raise OSError(28, 'No space left on device')

  commit.write_manifest = full
  manager.save(2, state(wide, P('data')))
  try:
    manager.wait()
  except checkpoint.CheckpointError as error:
    report['error'] = str(error)
  report['steps'] = manager.steps()
  print(json.dumps(report), flush=True)
"""


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


@pytest.mark.processes
def test_two_processes_save_and_restore(tmp_path: Path, subprocess_env: dict[str, str]) -> None:
  port = str(_free_port())
  subprocess_env.pop('JAX_NUM_CPU_DEVICES')
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(index), port, str(tmp_path / 'shared')],
      env=subprocess_env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for index, (output, errors) in enumerate(outputs):
    assert processes[index].returncode == 0, errors
    report = json.loads(output.splitlines()[-1])
    error = report.pop('error')
    assert report == {
      'same': True,
      'key': True,
      'position': 10 + index,
      'all': [10, 11],
      'steps': [1],
    }
    assert ('No space left' if index == 0 else 'process 0 of 2 failed') in error
