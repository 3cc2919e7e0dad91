"""Losses: exit cross-entropy, exit weighting, schedules."""

from exitax.objectives.cross_entropy import ExitSums, Teacher, exit_cross_entropy
from exitax.objectives.exit_objective import (
  LossSums,
  ObjectiveConfig,
  PackedBatch,
  exit_objective,
  exits_by_matrix,
)
from exitax.objectives.schedules import CurriculumKind, ExitCurriculum, ExitWeight, WeightCurve
from exitax.objectives.scores import ExitScore, ScoreFn, add_sums, exit_scores, make_score_fn
from exitax.objectives.span_objective import (
  Microbatch,
  SharedParams,
  SpanObjective,
  VocabPlacement,
  split_shared,
)

__all__ = [
  'CurriculumKind',
  'ExitCurriculum',
  'ExitScore',
  'ExitSums',
  'ExitWeight',
  'LossSums',
  'Microbatch',
  'ObjectiveConfig',
  'PackedBatch',
  'ScoreFn',
  'SharedParams',
  'SpanObjective',
  'Teacher',
  'VocabPlacement',
  'WeightCurve',
  'add_sums',
  'exit_cross_entropy',
  'exit_objective',
  'exit_scores',
  'exits_by_matrix',
  'make_score_fn',
  'split_shared',
]
