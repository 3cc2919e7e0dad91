"""The table of parameters, as numbers and as text."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from exitax import parallel

RULES = parallel.ShardingRules()
SHAPES = {
  'embed': jax.ShapeDtypeStruct((4096, 64), 'float32'),
  'blocks': {'key': jax.ShapeDtypeStruct((2, 64, 3, 16), 'bfloat16')},
  'step': jax.ShapeDtypeStruct((), 'int32'),
}
AXES = {
  'embed': ('vocab', 'embed'),
  'blocks': {'key': ('layers', 'embed', 'kv_heads', 'kv')},
  'step': (),
}


def report_on(sizes) -> parallel.ParameterReport:
  return parallel.parameter_report(
    SHAPES, AXES, parallel.make_mesh(parallel.MeshConfig(*sizes)), RULES
  )


def test_rows_are_exact():
  key, embed, step = report_on((2, 1, 4)).rows
  assert key == parallel.ParameterRow(
    path='blocks/key',
    shape=(2, 64, 3, 16),
    dtype='bfloat16',
    logical_axes=('layers', 'embed', 'kv_heads', 'kv'),
    mesh_axes=((), ('data',), (), ()),  # 3 heads do not spread over 4: replicated.
    num_elements=6144,
    bytes_per_device=6144,
    bytes_total=12288,
  )
  assert embed.mesh_axes == (('tensor',), ('data',))
  assert (step.bytes_per_device, step.bytes_total) == (4, 4)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 1, 4), (1, 2, 4)])
def test_bytes_per_device_are_what_a_device_holds(sizes):
  mesh = parallel.make_mesh(parallel.MeshConfig(*sizes))
  arrays = jax.tree.map(
    lambda leaf, sharding: jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding),
    SHAPES,
    parallel.tree_shardings(SHAPES, AXES, mesh, RULES),
  )
  for device in (0, -1):
    held = sum(leaf.addressable_shards[device].data.nbytes for leaf in jax.tree.leaves(arrays))
    assert report_on(sizes).bytes_per_device == held


def test_abstract_mesh_gives_the_same_report():
  mesh = AbstractMesh((2, 1, 4), parallel.MESH_AXES)
  assert parallel.parameter_report(SHAPES, AXES, mesh, RULES) == report_on((2, 1, 4))


TEXT = """
parameter   shape      dtype     logical axes              mesh axes    per device     total
----------  ---------  --------  ------------------------  -----------  ----------  --------
blocks/key  2x64x3x16  bfloat16  layers embed kv_heads kv  - data - -      6.0 KiB  12.0 KiB
embed       4096x64    float32   vocab embed               tensor data   128.0 KiB   1.0 MiB
step        scalar     int32                                                   4 B       4 B
----------  ---------  --------  ------------------------  -----------  ----------  --------
total       268,289                                                      134.0 KiB   1.0 MiB
mesh data=2 x pipeline=1 x tensor=4
"""


def test_text():
  assert parallel.render_report(report_on((2, 1, 4))) == TEXT.strip()


@pytest.mark.parametrize(
  ('count', 'text'),
  [(0, '0 B'), (1023, '1023 B'), (1024, '1.0 KiB'), (1536, '1.5 KiB'), (3 << 30, '3.0 GiB')],
)
def test_bytes_read_well(count, text):
  assert parallel.format_bytes(count) == text
