"""The picture of an advice: agreement, runs, where a step's time goes, and speed-ups."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from exitax.evaluate.advice.report import AdviceReport
from exitax.evaluate.advice.verdict import SPECULATION, Outcome, verdict_of
from exitax.evaluate.picture import COLOURS, GREY

_LONGEST_RUN = 12


def draw_advice(report: AdviceReport) -> Figure:
  """The picture as a figure of its own, outside pyplot's state."""
  figure = Figure(figsize=(13, 9), layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.add_gridspec(2, 2)
  _draw_agreement(figure.add_subplot(grid[0, 0]), report)
  _draw_runs(figure.add_subplot(grid[0, 1]), report)
  _draw_speculation(figure.add_subplot(grid[1, 0]), report)
  _draw_thresholds(figure.add_subplot(grid[1, 1]), report)
  figure.suptitle(_title(report), fontsize=14)
  machine = report.machine
  figure.supxlabel(
    f'{report.model.directory}, step {report.model.step}; {machine.processor}, {machine.cores} cores, '
    f'one prompt at a time, {machine.date[:10]}',
    fontsize=9,
    color=GREY,
  )
  return figure


def _title(report: AdviceReport) -> str:
  best, threshold = report.best_speculation, report.best_threshold
  match Outcome(verdict_of(report).outcome):
    case Outcome.LOSSLESS:
      return (
        f'Early exit pays: draft after layer {best.layer}, {best.num_drafts} a round, same text'
      )
    case Outcome.THRESHOLD:
      return f'Early exit pays if text may change: threshold {threshold.threshold:g}'
    case _:
      return 'Early exit does not pay for this model on this data'


def _draw_agreement(axes: Axes, report: AdviceReport) -> None:
  layers = [item.layer for item in report.exits]
  places = range(len(layers))
  for offset, colour, label, values in (
    (-0.2, COLOURS[0], 'held-out text', [item.held_out_agreement for item in report.exits]),
    (0.2, COLOURS[2], 'its own text', [item.own_agreement for item in report.exits]),
  ):
    bars = axes.bar([x + offset for x in places], values, 0.38, color=colour, label=label)
    axes.bar_label(bars, [f'{value:.0%}' for value in values], fontsize=9)
  axes.set_xticks(list(places), [f'exit after {layer}' for layer in layers])
  axes.set_ylim(0, 1.3)
  axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.set_title('Agreement with the final layer (measured)')
  axes.legend(loc='upper center', ncols=2, fontsize=9, frameon=False)


def _draw_runs(axes: Axes, report: AdviceReport) -> None:
  for item, colour in zip(report.exits, COLOURS * 9, strict=False):
    reach = item.reach[: _LONGEST_RUN + 1]
    formula = [item.own_agreement**length for length in range(len(reach))]
    axes.plot(reach, 'o-', color=colour, markersize=4, label=f'exit after {item.layer}')
    axes.plot(formula, ':', color=colour, linewidth=1.2)
  axes.plot([], [], ':', color=GREY, label='if tokens were independent')
  axes.set_ylim(0, 1.05)
  axes.set_xlabel('tokens in a row')
  axes.set_ylabel('share of runs at least as long')
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.set_title('How long exits agree before they do not (measured)')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=9)


def _draw_speculation(axes: Axes, report: AdviceReport) -> None:
  for item, colour in zip(report.exits, COLOURS * 9, strict=False):
    rows = [row for row in report.speculation if row.layer == item.layer]
    drafts = [row.num_drafts for row in rows]
    axes.plot(
      drafts,
      [row.speed_up for row in rows],
      'o-',
      color=colour,
      markersize=5,
      label=f'after layer {item.layer}, predicted',
    )
    axes.plot(drafts, [row.formula_speed_up for row in rows], ':', color=colour, linewidth=1.2)
  axes.plot([], [], ':', color=GREY, label='by the formula')
  check, best = report.check(SPECULATION), report.best_speculation
  if check is not None:
    axes.plot(
      [best.num_drafts], [check.measured], '*', color='black', markersize=14, label='measured'
    )
  axes.axhline(1, color=GREY, linestyle='--', linewidth=1)
  axes.set_ylim(bottom=0)
  axes.set_xlabel('drafts per round')
  axes.set_ylabel('speed-up over full depth (x)')
  axes.set_title('Speculation: the same text')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=9, loc='lower left')


def _draw_thresholds(axes: Axes, report: AdviceReport) -> None:
  agreement = [row.agreement for row in report.thresholds]
  for name, colour, values in (
    ('deferred', COLOURS[0], [row.deferred for row in report.thresholds]),
    ('copy_state', COLOURS[1], [row.copy_state for row in report.thresholds]),
  ):
    axes.plot(values, agreement, 'o-', color=colour, markersize=4, label=f'{name}, predicted')
    check, best = report.check(name), report.best_threshold
    if check is not None:
      axes.plot(
        [check.measured],
        [best.agreement],
        '*',
        color=colour,
        markeredgecolor='black',
        markersize=14,
        label=f'{name} at {best.threshold:g}, measured',
      )
  axes.axvline(1, color=GREY, linestyle='--', linewidth=1)
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.set_xlabel('speed-up over full depth (x)')
  axes.set_ylabel('choices kept, token by token')
  axes.set_title(f'Thresholds on {report.measure}: text may change')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=9)
