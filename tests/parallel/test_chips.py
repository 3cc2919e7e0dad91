"""Chips are found by the name that JAX gives their devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from exitax import parallel


@pytest.mark.parametrize(
  ('device_kind', 'name'),
  [
    ('TPU v4', 'TPU v4'),
    ('TPU v5 lite', 'TPU v5e'),
    ('TPU v5', 'TPU v5p'),
    ('TPU v5p', 'TPU v5p'),
    ('TPU v6 lite', 'TPU v6e'),
    ('NVIDIA H100 80GB HBM3', 'H100 SXM'),
    ('NVIDIA H100 PCIe', 'H100 PCIe'),
    ('NVIDIA A100-SXM4-80GB', 'A100 80GB'),
    ('NVIDIA A100-SXM4-40GB', 'A100 40GB'),
  ],
)
def test_found_by_device_kind(device_kind, name):
  assert parallel.find_chip(device_kind).name == name


@pytest.mark.parametrize('device_kind', ['cpu', 'TPU v50', 'NVIDIA H1000'])
def test_unlisted_kinds_are_not_guessed(device_kind):
  assert parallel.find_chip(device_kind) is None


def test_units_are_flops_and_bytes():
  for chip in parallel.CHIPS:
    assert 1e14 < chip.bf16_flops < 1e16, chip
    assert 1e10 < chip.hbm_bytes < 1e12, chip
    assert 5e11 < chip.hbm_bandwidth < 1e13, chip
    assert chip.source


def test_cpu_has_no_data_sheet_but_a_measured_rate():
  assert parallel.peak_flops(jax.devices('cpu')[0]) is None
  rate = parallel.measure_matmul_flops(jnp.float32, seconds=0.05)
  assert 1e8 < rate < 1e14


def test_measuring_works_under_an_ambient_mesh() -> None:
  with parallel.use(parallel.make_mesh(parallel.MeshConfig()), parallel.ShardingRules()):
    assert parallel.measure_matmul_flops('float32', seconds=0.01) > 0
