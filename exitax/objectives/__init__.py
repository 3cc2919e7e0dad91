"""Losses: exit cross-entropy, exit weighting, schedules."""

from exitax.objectives.cross_entropy import ExitSums, exit_cross_entropy
from exitax.objectives.exit_objective import (
  LossSums,
  ObjectiveConfig,
  PackedBatch,
  exit_objective,
)
from exitax.objectives.schedules import ExitWeight, WeightCurve

__all__ = [
  'ExitSums',
  'ExitWeight',
  'LossSums',
  'ObjectiveConfig',
  'PackedBatch',
  'WeightCurve',
  'exit_cross_entropy',
  'exit_objective',
]
