"""Whole runs with dropout: resumed, evaluated, and over a pipeline."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from exitax import parallel, training
from exitax.models import DropoutConfig

DROPPED = DropoutConfig(residual_rate=0.1, embedding_rate=0.1, layer_rate=0.5, curriculum_steps=8)


class _Crash(Exception):
  pass


class _CrashingDisplay(training.QuietDisplay):
  """Ends the run in the middle, after the checkpoint of step 3."""

  def advance(self, step: int) -> None:
    if step == 5:
      raise _Crash


def _config(tiny, root, dropout: DropoutConfig = DROPPED, **loop) -> training.RunConfig:
  return dataclasses.replace(tiny.make_config(root, **loop), dropout=dropout)


def _losses(model_dir) -> dict[int, float]:
  lines = training.read_metrics(model_dir)
  return {line['step']: line['train/loss'] for line in lines if 'train/loss' in line}


@pytest.fixture(scope='module')
def straight(tiny, root, tmp_path_factory):
  """A run of 8 steps that drops: its result and its model directory."""
  model_dir = tmp_path_factory.mktemp('dropped')
  return training.train(_config(tiny, root), model_dir), model_dir


def test_an_interrupted_run_drops_bitwise_what_a_straight_one_does(tiny, root, straight, tmp_path):
  wanted, straight_dir = straight
  with pytest.raises(_Crash):
    training.train(_config(tiny, root), tmp_path, display=_CrashingDisplay())
  result = training.train(_config(tiny, root), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, result.params, wanted.params)
  assert result.scores == wanted.scores
  assert _losses(tmp_path) == _losses(straight_dir)


def test_evaluation_drops_nothing_and_checkpoints_open_without_dropout(tiny, root, straight):
  """The finished run, opened again by one that drops nothing: the same scores to the last bit."""
  wanted, model_dir = straight
  again = training.train(_config(tiny, root, DropoutConfig()), model_dir)
  assert again.scores == wanted.scores
  jax.tree.map(np.testing.assert_array_equal, again.params, wanted.params)


def test_a_run_without_dropout_is_another_run(tiny, root, straight, tmp_path):
  _, model_dir = straight
  training.train(_config(tiny, root, DropoutConfig()), tmp_path)
  for step, loss in _losses(tmp_path).items():
    assert loss != _losses(model_dir)[step]


@pytest.mark.slow
def test_accumulation_over_a_pipeline_drops_what_one_device_does(tiny, root, straight, tmp_path):
  _, model_dir = straight
  config = dataclasses.replace(
    _config(tiny, root, accumulation_steps=2),
    mesh=parallel.MeshConfig(data=2, pipeline=2, tensor=2),
    pipeline=training.PipelineConfig(num_microbatches=2, recompute='layer'),
  )
  training.train(config, tmp_path)
  wanted = _losses(model_dir)
  assert _losses(tmp_path) == {step: pytest.approx(wanted[step], rel=1e-5) for step in wanted}
