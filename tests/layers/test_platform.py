from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from exitax.layers import platform


@pytest.mark.parametrize(
  ('flags', 'emulates'),
  [({'avx2', 'fma'}, True), ({'avx512_bf16'}, False), ({'amx_bf16', 'avx2'}, False), (set(), True)],
)
def test_bfloat16_is_emulated_by_cpus_without_its_instructions(monkeypatch, flags, emulates):
  monkeypatch.setattr(platform, '_cpu_flags', lambda: frozenset(flags))
  assert platform.emulates_bfloat16() is emulates
  monkeypatch.setattr(platform, 'on_cpu', lambda: False)
  assert not platform.emulates_bfloat16()


def test_only_axes_left_to_the_compiler_partition():
  assert not platform.partitioned()
  seen = []

  def body(x):
    seen.append(platform.partitioned())
    return x

  mesh = jax.make_mesh((2, 1), ('data', 'tensor'), (AxisType.Auto,) * 2, devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    assert platform.partitioned()
    split = PartitionSpec('data')
    jax.jit(jax.shard_map(body, in_specs=split, out_specs=split))(jnp.zeros(2))
  assert seen == [False]
  with jax.set_mesh(jax.make_mesh((1, 1), ('data', 'tensor'), devices=jax.devices()[:1])):
    assert not platform.partitioned()


def test_axes_are_merged_except_under_a_mesh_and_for_native_bfloat16_of_a_cpu(monkeypatch):
  monkeypatch.setattr(platform, '_cpu_flags', lambda: frozenset({'amx_bf16'}))
  assert platform.merges_axes(jnp.float32)
  assert not platform.merges_axes(jnp.bfloat16)
  monkeypatch.setattr(platform, '_cpu_flags', lambda: frozenset({'avx2'}))
  assert platform.merges_axes(jnp.bfloat16)
  monkeypatch.setattr(platform, 'on_cpu', lambda: False)
  assert platform.merges_axes(jnp.bfloat16)
  monkeypatch.setattr(platform, 'partitioned', lambda: True)
  assert not platform.merges_axes(jnp.float32)
