"""A report of groups as plain text for a terminal."""

from __future__ import annotations

from exitax.evaluate.groups.report import GROUP, LAG, Curve, GroupReport
from exitax.evaluate.rendering import table


def render_groups(report: GroupReport) -> str:
  """A table of all ways: coverage at the fair share, tokens and milliseconds to 90 %; then the gains."""
  header = [
    '',
    'thinkers',
    'fair share',
    'coverage then',
    'repeated',
    'tokens to 90%',
    'in all',
    'ms to 90%',
    'at the end',
  ]
  lines = [_heading(report), '', table(header, [_cells(curve) for curve in report.curves])]
  lines += _gain_lines(report)
  return '\n'.join(lines)


def _heading(report: GroupReport) -> str:
  model = report.model
  return (
    f'{model.directory} at step {model.step}: {model.parameters:,} parameters\n'
    f'{report.settings}: {report.problems:,} problems ({report.seeds} seeds), up to {report.tokens} tokens of '
    'each thinker'
  )


def _cells(curve: Curve) -> list[str]:
  lag = f' {curve.lag}' if curve.way == LAG else ''
  at = min(curve.fair_share, len(curve.coverage) - 1)
  half = (curve.high[at] - curve.low[at]) / 2
  reach = curve.tokens_to['0.9']
  total = '' if reach is None else f'{curve.total_tokens[reach]:.0f}'
  time = '' if reach is None or curve.step_ms is None else f'{reach * curve.step_ms:.1f}'
  return [
    curve.way.replace('_', ' ') + lag,
    str(curve.thinkers),
    str(curve.fair_share),
    f'{curve.coverage[at]:.3f} ± {half:.3f}',
    f'{curve.duplicate_share:.0%}',
    'never' if reach is None else str(reach),
    total,
    time,
    f'{curve.coverage[-1]:.3f}',
  ]


def _gain_lines(report: GroupReport) -> list[str]:
  lines = []
  for gain in report.gains:
    at = min(report.curve(GROUP, gain.thinkers).fair_share, report.tokens)
    lines.append(
      f'{gain.thinkers} thinkers cover {gain.mean[at]:+.3f} of independent texts at {at} tokens each (95 % '
      f'interval {gain.low[at]:+.3f} to {gain.high[at]:+.3f})'
    )
  return ['', *lines] if lines else []
