import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from exitax import parallel


def _on_four_devices(run, *args):
  mesh = parallel.make_mesh(parallel.MeshConfig(data=1, pipeline=4), jax.devices()[:4])
  with jax.set_mesh(mesh):
    return jax.jit(
      jax.shard_map(run, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    )(*args)


def test_all_hear_the_one_that_speaks_to_the_bit():
  """Row 0 from device 2, row 1 from device 0, row 2 from nobody."""
  floats = jnp.asarray([[0.1, -jnp.inf], [jnp.nan, 1e-40], [1.0, 2.0]], jnp.float32)
  speaker = jnp.asarray([2, 0, -1])

  def run(floats):
    device = jax.lax.axis_index('pipeline')
    words = {'floats': floats, 'device': jnp.full((3,), device), 'none': jnp.zeros((3, 0))}
    return parallel.announce(words, speaker == device, axis='pipeline')

  heard = _on_four_devices(run, floats)
  np.testing.assert_array_equal(heard['device'], [2, 0, 0])
  bits = np.asarray(floats).view(np.int32).copy()
  bits[2] = 0
  np.testing.assert_array_equal(np.asarray(heard['floats']).view(np.int32), bits)
  assert heard['none'].shape == (3, 0)


def test_words_have_32_bits():
  def run(x):
    return parallel.announce(x.astype(jnp.bfloat16), x > 0, axis='pipeline')

  with pytest.raises(ValueError, match='int32 or float32, not bfloat16'):
    _on_four_devices(run, jnp.ones((2,)))
