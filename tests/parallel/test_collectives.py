"""Collectives read from compiled text: programs whose collectives are known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from exitax import parallel
from exitax.parallel import Collective, MeshConfig, collectives_in, make_mesh

MESH = functools.partial(make_mesh, MeshConfig(data=2, pipeline=2, tensor=2))


def _compiled(fn, mesh, *shapes):
  return jax.jit(fn).lower(*shapes).compile().as_text()


def _found(body, in_spec, out_spec, shape, axes):
  mesh = MESH()
  fn = jax.shard_map(
    body, mesh=mesh, in_specs=in_spec, out_specs=out_spec, axis_names=set(axes), check_vma=False
  )
  return collectives_in(_compiled(fn, mesh, jax.ShapeDtypeStruct(shape, jnp.float32)), mesh)


ALL = ('data', 'pipeline', 'tensor')


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    # A device's part is 2 x 4 x 4 numbers, 128 bytes; rings of two devices send half of the whole.
    (lambda x: jax.lax.psum(x, 'tensor'), ('all-reduce', ('tensor',), 1, 128)),
    (lambda x: jax.lax.psum(x, ('data', 'tensor')), ('all-reduce', ('data', 'tensor'), 1, 192)),
    (lambda x: jax.lax.all_gather(x, 'data'), ('all-gather', ('data',), 1, 128)),
    (
      lambda x: jax.lax.ppermute(x, 'pipeline', [(0, 1), (1, 0)]),
      ('collective-permute', ('pipeline',), 1, 128),
    ),
    (
      lambda x: jax.lax.psum_scatter(x, 'pipeline', scatter_dimension=1, tiled=True),
      ('reduce-scatter', ('pipeline',), 1, 64),
    ),
    (
      lambda x: jax.lax.all_to_all(x, 'data', split_axis=1, concat_axis=2, tiled=True),
      ('all-to-all', ('data',), 1, 64),
    ),
  ],
)
def test_one_collective_of_each_kind(body, expected):
  found = _found(body, PartitionSpec('data'), PartitionSpec('data'), (4, 4, 4), ALL)
  assert found == (Collective(*expected),)


def test_loops_multiply_and_nest():
  def body(x):
    def inner(x, _):
      return jax.lax.psum(jnp.sin(x), 'tensor') * 0.1, None

    def outer(x, _):
      x, _ = jax.lax.scan(inner, x, None, length=5)
      return jax.lax.ppermute(x, 'pipeline', [(0, 1)]), None

    return jax.lax.scan(outer, x, None, length=3)[0]

  found = _found(body, PartitionSpec('data'), PartitionSpec('data'), (4, 4), ALL)
  assert found == (
    Collective('all-reduce', ('tensor',), 15, 15 * 32),
    Collective('collective-permute', ('pipeline',), 3, 3 * 32),
  )


def test_of_a_conditional_the_dearest_branch_counts():
  def body(x):
    def twice(x):
      return jax.lax.psum(jnp.cos(jax.lax.psum(x, 'tensor')), 'tensor')

    index = jax.lax.axis_index('pipeline')
    return jax.lax.switch(index, [lambda x: x, twice], x)

  found = _found(body, PartitionSpec('data'), PartitionSpec('data'), (4, 4), ALL)
  assert found == (Collective('all-reduce', ('tensor',), 2, 64),)


def test_collectives_of_the_compiler_are_found():
  """A product contracted over a sharded dimension ends in an all-reduce of its result."""
  mesh = make_mesh(MeshConfig(data=1, tensor=8))

  def place(*spec):
    return NamedSharding(mesh, PartitionSpec(*spec))

  left = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place(None, 'tensor'))
  right = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=place('tensor', None))
  compiled = jax.jit(jnp.matmul, out_shardings=place()).lower(left, right).compile()
  found = collectives_in(compiled.as_text(), mesh)
  assert found == (Collective('all-reduce', ('tensor',), 1, 2 * 8 * 8 * 4 * 7 // 8),)


# Cut from what the TPU's compiler writes: a loop whose bound stands in its condition, a gather in
# three fused pieces of one chain, a permute that returns what it was given, groups by formula.
TPU = """
HloModule jit_step, is_scheduled=true

%cond (p.1: (s32[], f32[8,128])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(7)
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

%start (p.2: bf16[8,64]) -> bf16[16,64] {
  %p.2 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,64]{1,0} all-gather(%p.2), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="11"}
}

%done (p.3: bf16[8,64]) -> bf16[16,64] {
  %p.3 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,64]{1,0} all-gather(%p.3), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="11"}
}

%body (p.4: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.4 = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%p.4), index=1
  %fusion.1 = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%done
  %send.1 = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,2},{1,3},{4,6},{5,7}}
  %send.2 = f32[8,128]{1,0} collective-permute-done(%send.1)
  ROOT %tuple = (s32[]{:T(128)}, f32[8,128]{1,0}) tuple(%i, %send.2)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %sum = f32[8,128]{1,0} all-reduce(%a), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%add
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %r = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_the_tpu_compiler_writes():
  assert collectives_in(TPU, MESH()) == (
    Collective('collective-permute', ('pipeline',), 7, 7 * 8 * 128 * 4),
    Collective('all-gather', ('tensor',), 7, 7 * 16 * 64 * 2 // 2),
    Collective('all-reduce', ('data',), 1, 8 * 128 * 4),
  )


def test_groups_may_be_named_by_the_axes_of_a_mesh():
  text = TPU.replace(
    'replica_groups=[4,2]<=[2,4]T(1,0)',
    "replica_groups=mesh['data'=2,'pipeline'=2,'tensor'=2] {'data','tensor'}",
  )
  assert collectives_in(text, MESH())[-1] == Collective(
    'all-reduce', ('data', 'tensor'), 1, 2 * 8 * 128 * 4 * 3 // 4
  )


def test_a_program_on_one_device_has_none():
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  text = jax.jit(lambda x: x @ x).lower(np.ones((4, 4), np.float32)).compile().as_text()
  assert parallel.collectives_in(text, mesh) == ()
