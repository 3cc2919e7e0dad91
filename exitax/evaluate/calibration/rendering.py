"""A calibration as plain text for a terminal."""

from __future__ import annotations

from exitax.evaluate.calibration.config import Method
from exitax.evaluate.calibration.report import CalibrationReport
from exitax.evaluate.rendering import table


def render_calibration(report: CalibrationReport) -> str:
  """The table of thresholds, then the verdict in sentences."""
  return f'{_heading(report)}\n\n{_rows(report)}\n\n{verdict(report)}\n'


def verdict(report: CalibrationReport) -> str:
  """What is certified, or why nothing is and how many more examples it would take."""
  decision, config = report.decision, report.config
  if decision.threshold is not None:
    layers = next(
      layers
      for row, layers in zip(decision.rows, report.layers, strict=True)
      if row.threshold == decision.threshold
    )
    return (
      f'Certified: {report.statement}.\n{layers:.2f} of {report.model.num_layers} layers per token.'
    )
  row = decision.rows[1]
  lines = [
    f'Not certified: at threshold {row.threshold:g}, the most careful one, {decision.examples} examples bound '
    f'the {report.loss} by {row.bound:.4f} (measured {row.risk:.4f}), above the limit {config.risk:g}.'
  ]
  if decision.examples_needed is None:
    lines.append(
      'More examples would not help if that is the true risk: raise --risk, or train the exits more.'
    )
  else:
    more = max(decision.examples_needed - decision.examples, 1)
    lines.append(
      f'At that measured risk it would take {decision.examples_needed} examples, {more} more; without any '
      f'loss at least {decision.examples_at_no_loss}.'
    )
    if report.available < decision.examples_needed:
      lines.append(
        f'There are {report.available} here: shorten --max_new_tokens, or bring prompts with '
        '--prompt_file.'
      )
  return '\n'.join(lines)


def _heading(report: CalibrationReport) -> str:
  config, decision = report.config, report.decision
  certainty = f', confidence {config.confidence:g}' if config.method is Method.LTT else ''
  name = 'Learn then Test' if config.method is Method.LTT else 'conformal risk control'
  return (
    f'{report.model.directory} at step {report.model.step}, exits after layers '
    f'{", ".join(str(depth) for depth in report.model.depths[:-1])} of {report.model.num_layers}\n'
    f'{name}: {report.loss}, limit {config.risk:g}{certainty}\n'
    f'{decision.examples} of {report.population}; {config.strategy.value}, {config.measure.value}'
  )


def _rows(report: CalibrationReport) -> str:
  header = ('threshold', 'layers/token', 'risk', 'bound', 'p-value', 'passes', '')
  rows = [
    (
      f'{row.threshold:g}',
      f'{layers:.2f}',
      f'{row.risk:.4f}',
      f'{row.bound:.4f}',
      '' if row.p_value is None else f'{row.p_value:.3g}',
      'yes' if row.passes else 'no',
      'certified' if row.threshold == report.decision.threshold else '',
    )
    for row, layers in zip(report.decision.rows, report.layers, strict=True)
  ]
  return table(header, rows)
