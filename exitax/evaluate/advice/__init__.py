"""Advice: does early exit pay for a model, on its data, on this machine?"""

from exitax.evaluate.advice.advise import advise
from exitax.evaluate.advice.config import AdviseConfig
from exitax.evaluate.advice.costs import PartCosts, measure_costs
from exitax.evaluate.advice.rendering import render_advice
from exitax.evaluate.advice.report import (
  AdviceReport,
  Check,
  ExitFacts,
  SpeculationRow,
  ThresholdSpeed,
  write_advice,
)
from exitax.evaluate.advice.rounds import (
  Work,
  copied_work,
  deferred_work,
  geometric_tokens_per_round,
  run_survival,
  tokens_per_round,
)
from exitax.evaluate.advice.timing import PolicySpeed, time_policies
from exitax.evaluate.advice.verdict import Outcome, Verdict, verdict_of

__all__ = [
  # The one call.
  'AdviseConfig',
  'advise',
  # Reports.
  'AdviceReport',
  'Check',
  'ExitFacts',
  'Outcome',
  'SpeculationRow',
  'ThresholdSpeed',
  'Verdict',
  'render_advice',
  'verdict_of',
  'write_advice',
  # Counting and timing.
  'PartCosts',
  'PolicySpeed',
  'Work',
  'copied_work',
  'deferred_work',
  'geometric_tokens_per_round',
  'measure_costs',
  'run_survival',
  'time_policies',
  'tokens_per_round',
]
