from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from exitax import objectives, training
from exitax.training.health import HealthBounds, largest_rms

BOUNDS = HealthBounds(max_nll=10.0, max_rms=100.0)


def _sums(*nll: float) -> objectives.LossSums:
  values = np.asarray(nll, np.float32) * 4
  exits = objectives.ExitSums(nll=values, log_z_squared=values, correct=values)
  return objectives.LossSums(exits=exits, tokens=np.float32(4))


def _metrics(*nll: float, loss: float = 1.0, norm: float = 1.0) -> training.StepMetrics:
  return training.StepMetrics(
    sums=_sums(*nll),
    loss=np.float32(loss),
    gradient_norm=np.float32(norm),
    learning_rate=np.float32(0.1),
    exit_weights=np.ones(len(nll), np.float32),
  )


def test_healthy_numbers_pass():
  assert BOUNDS.problem_in_step(_metrics(12.0, 10.0)) is None
  assert BOUNDS.problem_in_parameters(_sums(12.0, 10.0), 100.0) is None


@pytest.mark.parametrize(
  ('metrics', 'words'),
  [
    (_metrics(1.0, 10.5), 'final layer 10.5 (limit 10)'),
    (_metrics(1.0, np.nan), 'final layer nan'),
    (_metrics(1.0, 1.0, loss=np.inf), 'loss inf'),
    (_metrics(1.0, 1.0, norm=np.nan), 'gradient norm nan'),
  ],
)
def test_steps_that_diverged_are_told(metrics, words):
  assert words in BOUNDS.problem_in_step(metrics)


@pytest.mark.parametrize(
  ('sums', 'rms', 'words'),
  [
    (_sums(1.0, 10.5), 1.0, 'losses 1, 10.5 (limit 10)'),
    (_sums(np.nan, 1.0), 1.0, 'losses nan, 1'),
    (_sums(1.0, 1.0), 101.0, 'as large as 101 (limit 100)'),
    (_sums(1.0, 1.0), np.nan, 'as large as nan'),
  ],
)
def test_parameters_that_are_no_use_are_told(sums, rms, words):
  assert words in BOUNDS.problem_in_parameters(sums, rms)


def test_largest_rms_is_over_leaves():
  params = {'a': jnp.full((3, 4), 2.0), 'b': {'c': jnp.asarray([6.0, 8.0])}}
  assert largest_rms(params) == pytest.approx(np.sqrt(50.0))
  assert largest_rms({**params, 'd': jnp.asarray([1e30])}) == np.inf
  assert np.isnan(largest_rms({**params, 'd': jnp.asarray([np.nan])}))


def test_no_counted_token_is_no_problem():
  nothing = training.StepMetrics(
    sums=objectives.LossSums(exits=_sums(0.0).exits, tokens=np.float32(0)),
    loss=np.float32(0),
    gradient_norm=np.float32(0),
    learning_rate=np.float32(0),
    exit_weights=np.ones(1, np.float32),
  )
  assert BOUNDS.problem_in_step(nothing) is None
