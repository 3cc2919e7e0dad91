"""Standard benchmarks: tasks of lm-evaluation-harness on every exit and every exit policy.

All but the settings and reports needs the extra `harness` (lm_eval), which is imported by `open_tasks` and not
before.
"""

from exitax.evaluate.harness.config import TaskConfig
from exitax.evaluate.harness.library import ChatFn
from exitax.evaluate.harness.rendering import render_task_report
from exitax.evaluate.harness.report import (
  Metric,
  RowResult,
  TaskFiles,
  TaskReport,
  metrics_of,
  write_task_report,
)
from exitax.evaluate.harness.rows import FirstConfident, FixedDepth, Row, make_rows
from exitax.evaluate.harness.run import run_tasks
from exitax.evaluate.harness.scoring import ScoredText, Scorer
from exitax.evaluate.harness.tasks import OpenTasks, open_tasks
from exitax.evaluate.harness.writing import TextRequest, TextWriter, WrittenText

__all__ = [
  # The two calls.
  'OpenTasks',
  'TaskConfig',
  'open_tasks',
  'run_tasks',
  # What is compared.
  'ChatFn',
  'FirstConfident',
  'FixedDepth',
  'Row',
  'make_rows',
  # Scores and texts, without the harness.
  'ScoredText',
  'Scorer',
  'TextRequest',
  'TextWriter',
  'WrittenText',
  # Reports.
  'Metric',
  'RowResult',
  'TaskFiles',
  'TaskReport',
  'metrics_of',
  'render_task_report',
  'write_task_report',
]
