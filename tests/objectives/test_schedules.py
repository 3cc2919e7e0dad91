from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import objectives
from exitax.errors import UserError
from exitax.models import ExitConfig
from exitax.objectives import ExitWeight, ObjectiveConfig, WeightCurve


@pytest.mark.parametrize(
  ('curve', 'quarter'),
  [('linear', 0.25), ('cosine', (1 - math.cos(math.pi / 4)) / 2)],
)
@pytest.mark.parametrize(('start', 'end'), [(0.0, 1.0), (0.5, 0.125)])
def test_curves_at_their_ends_and_between(curve, quarter, start, end):
  weight = ExitWeight(start=start, end=end, steps=8, curve=curve)
  got = [float(weight.at(step)) for step in (0, 2, 4, 8, 9, 10_000)]
  way = end - start
  wanted = [start, start + quarter * way, start + way / 2, end, end, end]
  np.testing.assert_allclose(got, wanted, atol=1e-7)
  assert got[0] == start
  assert got[3] == got[5] == end


def test_a_constant_weight_ignores_its_way():
  weight = ExitWeight(start=0.3, end=5.0, steps=7)
  assert [float(weight.at(step)) for step in (0, 3, 100)] == [np.float32(0.3)] * 3


def test_weights_are_functions_of_a_traced_step():
  config = ObjectiveConfig(
    exit_weights=[
      ExitWeight(start=0.25),
      ExitWeight(start=0.0, end=1.0, steps=10, curve=WeightCurve.LINEAR),
    ]
  )
  got = jax.jit(config.weights_at)(jnp.int32(5))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, [0.25, 0.5, 1.0])


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'start': -0.5}, r'^exit weight -0.5 is negative: choose 0 or more$'),
    ({'start': 1.0, 'end': -2.0}, r'^exit weight -2.0 is negative'),
    ({'start': 1.0, 'curve': 'linear'}, r'^a linear exit weight needs steps >= 1, got 0$'),
    ({'start': 1.0, 'curve': 'square'}, r"^ExitWeight.curve='square' is not known: choose 'const"),
  ],
)
def test_bad_schedules_are_named(values, message):
  with pytest.raises(UserError, match=message):
    ExitWeight(**values)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'z_loss': -1e-4}, r'^z_loss=-0.0001 is negative'),
    ({'chunk_length': 0}, r'^chunk_length=0 must be at least 1'),
  ],
)
def test_bad_objectives_are_named(values, message):
  with pytest.raises(UserError, match=message):
    objectives.ObjectiveConfig(**values)


def test_one_weight_per_exit():
  config = ObjectiveConfig(exit_weights=(ExitWeight(start=0.5),))
  config.check((ExitConfig(layer=1),))
  with pytest.raises(UserError, match=r'^1 exit weights for 2 exits: give ObjectiveConfig'):
    config.check((ExitConfig(layer=1), ExitConfig(layer=2)))


def test_the_rotational_curriculum_counts_every_exit_once_in_a_period():
  curriculum = objectives.ExitCurriculum(kind='rotational', period=3)
  found = np.stack([curriculum.at(step, num_exits=5) for step in range(6)])
  assert found[:, -1].tolist() == [1.0] * 6  # The final layer always counts.
  assert found[0].tolist() == [1, 0, 0, 1, 0, 1]
  assert found[1].tolist() == [0, 0, 1, 0, 0, 1]
  assert np.array_equal(found[:3, :-1].sum(axis=0), np.ones(5))
  assert np.array_equal(found[:3], found[3:])


def test_the_gradual_curriculum_begins_with_the_deepest_exit():
  curriculum = objectives.ExitCurriculum(kind='gradual', steps=12)
  found = {step: curriculum.at(step, num_exits=3).tolist() for step in (0, 1, 2, 3, 4, 6, 11)}
  assert found == {
    0: [0, 0, 1, 1],
    1: [0, 0, 1, 1],
    2: [0, 1, 1, 1],
    3: [0, 1, 1, 1],
    4: [1, 1, 1, 1],
    6: [1, 1, 1, 1],
    11: [1, 1, 1, 1],
  }


def test_curricula_weigh_exits():
  objective = objectives.ObjectiveConfig(
    exit_weights=tuple(objectives.ExitWeight(start=w) for w in (0.25, 0.5)),
    curriculum=objectives.ExitCurriculum(kind='rotational', period=2),
  )
  assert objective.weights_at(0).tolist() == [0.25, 0.0, 1.0]
  assert objective.weights_at(jnp.int32(1)).tolist() == [0.0, 0.5, 1.0]
  assert objectives.ObjectiveConfig().weights_at(7).tolist() == [1.0]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'kind': 'rotating'}, "ExitCurriculum.kind='rotating' is not known"),
    ({'kind': 'rotational', 'period': 0}, r'period=0 must be at least 1'),
    ({'kind': 'gradual'}, 'gradual ExitCurriculum needs steps'),
  ],
)
def test_curricula_that_make_no_sense(arguments, message):
  with pytest.raises(UserError, match=message):
    objectives.ExitCurriculum(**arguments)


def test_distillation_is_a_share():
  with pytest.raises(UserError, match=r'distillation=1\.5 is outside'):
    objectives.ObjectiveConfig(distillation=1.5)
