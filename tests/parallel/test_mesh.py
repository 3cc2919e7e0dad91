"""Meshes: every factorisation of eight devices, and what is said when one does not fit."""

from __future__ import annotations

import itertools

import jax
import pytest
from jax.sharding import AxisType

from exitax import parallel
from exitax.errors import UserError

FACTORISATIONS = [
  sizes
  for sizes in itertools.product((1, 2, 4, 8), repeat=3)
  if sizes[0] * sizes[1] * sizes[2] == 8
]


@pytest.mark.parametrize('sizes', FACTORISATIONS)
def test_every_factorisation(sizes):
  mesh = parallel.make_mesh(parallel.MeshConfig(*sizes))
  assert mesh.devices.shape == sizes
  assert mesh.axis_names == ('data', 'pipeline', 'tensor')
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize('axis', parallel.MESH_AXES)
def test_minus_one_takes_what_is_left(axis):
  sizes = {'data': 2, 'pipeline': 2, 'tensor': 2} | {axis: -1}
  assert parallel.MeshConfig(**sizes).resolve(24) == parallel.MeshConfig(**(sizes | {axis: 6}))


def test_default_is_all_devices_on_data():
  assert parallel.make_mesh(parallel.MeshConfig()).shape['data'] == 8


def test_given_devices_are_used():
  mesh = parallel.make_mesh(parallel.MeshConfig(tensor=3), jax.devices()[2:5])
  assert set(mesh.devices.flat) == set(jax.devices()[2:5])


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (
      parallel.MeshConfig(2, 1, 3),
      'mesh data=2 x pipeline=1 x tensor=3 = 6 does not match 8 devices: '
      'choose pipeline x tensor among 1, 2, 4 or 8, and data=-1',
    ),
    (
      parallel.MeshConfig(3, 1, 2),
      'mesh data=3 x pipeline=1 x tensor=2 = 6 does not match 8 devices: choose data=4 or data=-1',
    ),
    (
      parallel.MeshConfig(-1, 1, 3),
      'mesh data=-1 x pipeline=1 x tensor=3: pipeline x tensor = 3 does not divide 8 devices: '
      'choose a product of 1, 2, 4 or 8',
    ),
    (
      parallel.MeshConfig(-1, 1, -1),
      'mesh data=-1 and tensor=-1: only one axis can be -1, give the others a size',
    ),
    (
      parallel.MeshConfig(8, 0, 1),
      'mesh pipeline=0: choose 1 or more, or -1 for whatever is left',
    ),
    (
      parallel.MeshConfig(8, 1, -2),
      'mesh tensor=-2: choose 1 or more, or -1 for whatever is left',
    ),
  ],
)
def test_misfits_name_value_limit_and_fix(config, message):
  with pytest.raises(UserError) as error:
    parallel.make_mesh(config)
  assert str(error.value) == message
