"""Names of TPU slices."""

from __future__ import annotations

import re

import pytest

from exitax.errors import UserError
from exitax.parallel import find_chip, has_tpu_compiler, parse_topology, topology, tpu_devices

needs_compiler = pytest.mark.skipif(
  not has_tpu_compiler(), reason='the TPU compiler is not installed: pip install "exitax[plan]"'
)


@pytest.mark.parametrize(
  ('name', 'written', 'num_chips', 'chip'),
  [
    ('v5e:4x4', 'v5e:4x4', 16, 'TPU v5e'),
    ('V6E:8x8', 'v6e:8x8', 64, 'TPU v6e'),
    ('v5p:2x2x4', 'v5p:2x2x4', 16, 'TPU v5p'),
    # Products of v4 and v5p count TensorCores, two on a chip.
    ('v5p-128', 'v5p:4x4x4', 64, 'TPU v5p'),
    ('v4-8', 'v4:2x2x1', 4, 'TPU v4'),
    ('v5litepod-16', 'v5e:4x4', 16, 'TPU v5e'),
    ('v6e-8', 'v6e:2x4', 8, 'TPU v6e'),
  ],
)
def test_names(name, written, num_chips, chip):
  found = parse_topology(name)
  assert (str(found), found.num_chips, found.chip.name) == (written, num_chips, chip)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('h100', "topology 'h100' is unknown: write GENERATION:SHAPE"),
    ('v9:2x2', "topology 'v9:2x2' is unknown"),
    ('v5e', "topology 'v5e' is unknown"),
    ('v5e:4x4x4', 'v5e is a torus of 2 dimensions, choose v5e:1x1'),
    ('v5e:3x5', "topology 'v5e:3x5' is no slice: choose v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4"),
    ('v5p:4x4', 'v5p is a torus of 3 dimensions, choose v5p:2x2x1'),
    ('v5p-7', "topology 'v5p-7' is no slice: choose v5p-8, v5p-16"),
    ('v6e-5', 'is no slice: choose v6e-1, v6e-4'),
  ],
)
def test_unknown_names(name, message):
  with pytest.raises(UserError, match=re.escape(message)):
    parse_topology(name)


@needs_compiler
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:1x1', 'v5e:2x4', 'v5p:2x2x2', 'v6e:4x4'])
def test_devices_of_a_slice_are_its_chips(name):
  wanted = parse_topology(name)
  devices = tpu_devices(wanted)
  assert len(devices) == wanted.num_chips
  assert {device.platform for device in devices} == {'tpu'}
  assert find_chip(devices[0].device_kind) == wanted.chip


@needs_compiler
def test_a_slice_that_the_compiler_refuses():
  with pytest.raises(UserError, match=r"topology 'v5p:3x5x1' is refused .*: choose v5p:2x2x1"):
    tpu_devices(parse_topology('v5p:3x5x1'))


def test_without_the_compiler_the_fix_is_named(monkeypatch):
  monkeypatch.setattr(topology, 'has_tpu_compiler', lambda: False)
  with pytest.raises(UserError, match=r'pip install "exitax\[plan\]"'):
    tpu_devices(parse_topology('v5e:2x2'))
