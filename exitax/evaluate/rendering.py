"""A report as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from exitax.evaluate.report import EvaluationReport
from exitax.evaluate.thresholds import ThresholdRow


def render_report(report: EvaluationReport) -> str:
  """Tables of exits and of the main measure's thresholds, without colour.

  The other measures are in the files that `write_report` writes.
  """
  parts = [_heading(report), _exit_table(report), _threshold_table(report), _remarks(report)]
  return '\n\n'.join(parts) + '\n'


def _heading(report: EvaluationReport) -> str:
  model, data = report.model, report.data
  exits = ', '.join(str(depth) for depth in model.depths[:-1]) or 'none'
  return (
    f'{model.directory} at step {model.step}: {model.num_layers} layers, exits after layers: '
    f'{exits}; {model.parameters:,} parameters\n'
    f'{data.tokens:,} of {data.held_out_tokens:,} held-out tokens of {", ".join(data.tasks)} '
    f'({data.bytes_per_token:.2f} bytes per token)'
  )


def _exit_table(report: EvaluationReport) -> str:
  rows = [
    (
      score.name,
      str(score.layer),
      f'{score.nll:.4f}',
      f'{score.bits_per_byte:.4f}',
      f'{score.accuracy:.2%}',
      f'{agreement:.2%}',
    )
    for score, agreement in zip(report.exits, report.exit_agreement, strict=True)
  ]
  header = ('exit', 'layers', 'loss', 'bits/byte', 'accuracy', 'agrees with final')
  return 'Each exit alone\n' + table(header, rows)


def _threshold_table(report: EvaluationReport) -> str:
  confidence = report.confidences[0]
  header = ['threshold', 'layers/token', 'loss', 'bits/byte', 'accuracy', 'agrees']
  header += [score.name for score in report.exits]
  rows = [_threshold_row(report, row) for row in report.rows_of(confidence)]
  title = f'Exit where {confidence} > threshold'
  speed = report.speed
  if speed is not None and speed.rows:
    header += ['tokens/s', 'speed-up', 'same text']
    title += (
      f'; speed of {speed.prompts} prompts x {speed.new_tokens} new tokens, one at a time, '
      f'median of {speed.repeats} (speed-up: of the ratio within each repeat)'
    )
  return f'{title}\n' + table(header, rows)


def _threshold_row(report: EvaluationReport, row: ThresholdRow) -> tuple[str, ...]:
  cells = (
    f'{row.threshold:.2f}',
    f'{row.effective_layers:.2f}',
    f'{row.nll:.4f}',
    f'{row.bits_per_byte:.4f}',
    f'{row.accuracy:.2%}',
    f'{row.agreement:.2%}',
    *(f'{share:.1%}' for share in row.exit_shares),
  )
  speed = report.speed_of(row)
  if speed is None:
    return cells
  return (
    *cells,
    f'{speed.tokens_per_second:.1f}',
    f'{speed.speed_up:.2f}x',
    f'{speed.agreement:.1%}',
  )


def _remarks(report: EvaluationReport) -> str:
  oracle, depth = report.oracle, report.model.num_layers
  lines = [
    f'Oracle (earliest exit that agrees with the final layer): {oracle.effective_layers:.2f} of '
    f'{depth} layers per token'
  ]
  if report.speed is None:
    lines.append('Speed of decoding was not measured')
  else:
    lines.append(
      f'Full decoding: {report.speed.full_tokens_per_second:.1f} tokens/s on '
      f'{report.machine.processor}, {report.machine.cores} cores, {report.machine.device}'
    )
  return '\n'.join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns aligned to the right, the first to the left."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  lines = []
  for cells in (header, ['-' * width for width in widths], *rows):
    first, *rest = (
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    lines.append('  '.join([first, *rest]).rstrip())
  return '\n'.join(lines)
