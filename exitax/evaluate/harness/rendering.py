"""A report of benchmarks as plain text for a terminal."""

from __future__ import annotations

from exitax.evaluate.harness.report import Metric, RowResult, TaskReport, metrics_of
from exitax.evaluate.rendering import table


def render_task_report(report: TaskReport) -> str:
  """One table: rows are exits and policies, columns the metrics of the tasks that were asked for.

  Members of a group are left to the files that `write_task_report` writes, if the group has numbers of its own.
  """
  columns = list(dict.fromkeys(_key(metric) for row in report.rows for metric in _shown(row)))
  header = ['', 'layers/token', *(f'{task} {title}' for task, title in columns)]
  return f'{_heading(report)}\n\n' + table(header, [_cells(row, columns) for row in report.rows])


def _heading(report: TaskReport) -> str:
  model = report.model
  exits = ', '.join(str(depth) for depth in model.depths[:-1]) or 'none'
  limit = '' if report.limit is None else f'; the first {report.limit} documents of each task'
  return (
    f'{model.directory} at step {model.step}: {model.num_layers} layers, exits after layers: {exits}; '
    f'{model.parameters:,} parameters\n'
    f'lm-evaluation-harness {report.libraries["lm_eval"]}{limit}'
  )


def _cells(row: RowResult, columns: list[tuple[str, str]]) -> list[str]:
  found = {_key(metric): _number(metric) for metric in metrics_of(row)}
  layers = '' if row.layers_per_token is None else f'{row.layers_per_token:.2f}'
  return [row.name, layers, *(found.get(key, '') for key in columns)]


def _key(metric: Metric) -> tuple[str, str]:
  return metric.task, metric.title


def _number(metric: Metric) -> str:
  error = '' if metric.stderr is None else f' ± {metric.stderr:.4f}'
  return f'{metric.value:.4f}{error}'


def _shown(row: RowResult) -> list[Metric]:
  """Metrics of all but members of groups that have metrics themselves."""
  metrics = metrics_of(row)
  scored = {metric.task for metric in metrics}
  members = row.harness.get('group_subtasks', {})
  hidden = {task for group in members if group in scored for task in members[group]}
  return [metric for metric in metrics if metric.task not in hidden]
