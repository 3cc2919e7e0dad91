"""Group Think against chain of thought, independent sampling and itself with less to see, on tasks with exact scores."""

from exitax.evaluate.groups.config import GroupEvaluateConfig
from exitax.evaluate.groups.curves import at_equal_tokens, tokens_to
from exitax.evaluate.groups.evaluation import evaluate_groups
from exitax.evaluate.groups.rendering import render_groups
from exitax.evaluate.groups.report import (
  CHAIN,
  GROUP,
  INDEPENDENT,
  LAG,
  MASK_OFF,
  Curve,
  Gain,
  GroupReport,
  write_group_report,
)
from exitax.evaluate.groups.theory import ideal_coverage, independent_coverage

__all__ = [
  'CHAIN',
  'GROUP',
  'INDEPENDENT',
  'LAG',
  'MASK_OFF',
  'Curve',
  'Gain',
  'GroupEvaluateConfig',
  'GroupReport',
  'at_equal_tokens',
  'evaluate_groups',
  'ideal_coverage',
  'independent_coverage',
  'render_groups',
  'tokens_to',
  'write_group_report',
]
