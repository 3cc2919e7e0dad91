"""Advice as plain text for a terminal."""

from __future__ import annotations

from exitax.evaluate.advice.report import AdviceReport
from exitax.evaluate.advice.verdict import verdict_of
from exitax.evaluate.rendering import table

_RUNS = (1, 2, 4, 8)


def render_advice(report: AdviceReport) -> str:
  """Tables of what was measured and predicted, and the verdict last."""
  verdict = verdict_of(report)
  parts = [
    _heading(report),
    _exits(report),
    _costs(report),
    _speculation(report),
    _thresholds(report),
    _checks(report),
    f'{verdict.text}\n\n  {verdict.command}',
  ]
  return '\n\n'.join(parts) + '\n'


def _heading(report: AdviceReport) -> str:
  model, machine = report.model, report.machine
  return (
    f'{model.directory} at step {model.step}: {model.num_layers} layers, exits after '
    f'{", ".join(str(depth) for depth in model.depths[:-1])}\n'
    f'{machine.processor}, {machine.cores} cores, {machine.device}; one prompt at a time; full depth '
    f'{report.full_tokens_per_second:.0f} tokens/s'
  )


def _exits(report: AdviceReport) -> str:
  rows = [
    (
      str(item.layer),
      f'{item.held_out_agreement:.1%}',
      f'{item.own_agreement:.1%}',
      *(f'{item.reach[length]:.0%}' for length in _RUNS),
    )
    for item in report.exits
  ]
  header = ('exit', 'held-out', 'own text', *(f'runs of {length}+' for length in _RUNS))
  oracle = (
    f'Oracle (earliest exit that agrees): {report.oracle_layers:.2f} of {report.model.num_layers} layers '
    'per held-out token'
  )
  return f'Agreement with the final layer (measured)\n{table(header, rows)}\n{oracle}'


def _costs(report: AdviceReport) -> str:
  whole = next(
    row['seconds'] for row in report.costs if row['part'].startswith('whole step of full')
  )
  names = list(dict.fromkeys(row['part'] for row in report.costs))
  lanes = sorted({row['lanes'] for row in report.costs})
  cells = {(row['part'], row['lanes']): row['seconds'] for row in report.costs}
  rows = [
    (
      name,
      *(f'{cells[name, n] * 1e3:.3f}' if (name, n) in cells else '' for n in lanes),
      f'{cells[name, 1] / whole:.0%}' if (name, 1) in cells else '',
    )
    for name in names
  ]
  header = ('part', *(f'{n} lane{"s" if n > 1 else ""}' for n in lanes), 'of a step')
  return f'Milliseconds per pass (measured)\n{table(header, rows)}'


def _speculation(report: AdviceReport) -> str:
  best = report.best_speculation
  rows = [
    (
      str(row.layer),
      str(row.num_drafts),
      f'{row.tokens_per_round:.2f}',
      f'{row.formula:.2f}',
      f'{row.speed_up:.2f}x',
      f'{row.formula_speed_up:.2f}x',
      'best' if row == best else '',
    )
    for row in report.speculation
  ]
  header = ('exit', 'drafts', 'tokens/round', 'by formula', 'speed-up', 'by formula', '')
  return f'Speculation, the text of full depth (predicted)\n{table(header, rows)}'


def _thresholds(report: AdviceReport) -> str:
  rows = [
    (
      f'{row.threshold:g}',
      f'{row.agreement:.2%}',
      f'{row.layers:.2f}',
      f'{row.deferred:.2f}x',
      f'{row.copy_state:.2f}x',
    )
    for row in report.thresholds
  ]
  header = ('threshold', 'agrees', 'layers/token', 'deferred', 'copy_state')
  return f'Exit where {report.measure} > threshold (predicted)\n{table(header, rows)}'


def _checks(report: AdviceReport) -> str:
  rows = [
    (
      check.name,
      '' if check.predicted is None else f'{check.predicted:.2f}x',
      f'{check.measured:.2f}x',
      f'{check.same_text:.1%}',
    )
    for check in report.checks
  ]
  header = ('best of its kind', 'predicted', 'measured', 'same text')
  return f'Predictions beside measurements\n{table(header, rows)}'
