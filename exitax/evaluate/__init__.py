"""Evaluation: every exit, every threshold, and what a threshold saves in wall-clock time."""

from exitax.evaluate.classifiers import (
  ClassifierConfig,
  ClassifierScore,
  collect_streams,
  fit_classifiers,
  score_classifiers,
)
from exitax.evaluate.config import EvaluateConfig
from exitax.evaluate.decoding import PromptDecoder, held_out_prompts
from exitax.evaluate.draft_costs import measure_draft_costs
from exitax.evaluate.evaluation import evaluate
from exitax.evaluate.facts import DataFacts, MachineFacts, ModelFacts
from exitax.evaluate.rendering import render_report
from exitax.evaluate.report import EvaluationReport, ReportFiles, to_csv, write_report
from exitax.evaluate.speed import Decoded, DecodeFn, SpeedReport, SpeedRow, measure_speed
from exitax.evaluate.thresholds import (
  DEFAULT_THRESHOLDS,
  DepthScore,
  ThresholdRow,
  check_thresholds,
  depth_score,
  first_exit,
  oracle_score,
  threshold_rows,
)
from exitax.evaluate.token_table import TokenTable, token_table

__all__ = [
  # The one call.
  'EvaluateConfig',
  'evaluate',
  # Reports.
  'EvaluationReport',
  'ReportFiles',
  'DataFacts',
  'MachineFacts',
  'ModelFacts',
  'render_report',
  'to_csv',
  'write_report',
  # Teacher-forced tokens and thresholds.
  'DEFAULT_THRESHOLDS',
  'DepthScore',
  'ThresholdRow',
  'TokenTable',
  'check_thresholds',
  'depth_score',
  'first_exit',
  'oracle_score',
  'threshold_rows',
  'token_table',
  # Learned confidence.
  'ClassifierConfig',
  'ClassifierScore',
  'collect_streams',
  'fit_classifiers',
  'score_classifiers',
  # Speed of decoding.
  'DecodeFn',
  'Decoded',
  'PromptDecoder',
  'SpeedReport',
  'SpeedRow',
  'held_out_prompts',
  'measure_speed',
  'measure_draft_costs',
]
