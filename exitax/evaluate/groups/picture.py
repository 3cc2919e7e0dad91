"""The picture of groups: coverage against tokens of each thinker, of all, and milliseconds; and what delay costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from exitax.evaluate.groups.report import (
  CHAIN,
  GROUP,
  INDEPENDENT,
  LAG,
  MASK_OFF,
  Curve,
  GroupReport,
)
from exitax.evaluate.picture import COLOURS, GREY

_STYLES = {GROUP: '-', INDEPENDENT: '--', MASK_OFF: ':'}
_NAMES = {
  CHAIN: 'chain of thought',
  GROUP: 'Group Think',
  INDEPENDENT: 'independent',
  MASK_OFF: 'cross-mask off',
}


def draw_groups(report: GroupReport) -> Figure:
  """The picture as a figure of its own, outside pyplot's state."""
  figure = Figure(figsize=(13, 9.5), layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.subplots(2, 2, sharey=True)
  _draw_ways(
    grid[0, 0],
    report,
    lambda curve: range(len(curve.coverage)),
    'tokens of each thinker (latency)',
    theory=True,
  )
  grid[0, 0].legend(fontsize=8.5, loc='lower right')
  _draw_ways(grid[0, 1], report, lambda curve: curve.total_tokens, 'tokens of all thinkers (work)')
  _draw_time(grid[1, 0], report)
  _draw_lags(grid[1, 1], report)
  for axes in grid[:, 0]:
    axes.set_ylabel('coverage of the union')
  figure.suptitle(f'{_NAMES[GROUP]} on {report.task.replace("_", " ")}', fontsize=15)
  machine = report.machine
  figure.supxlabel(
    f'{report.model.directory}, step {report.model.step:,}; {report.problems:,} problems, bands are 95 % '
    f'intervals; {machine.processor}, {machine.cores} cores, {machine.date[:10]}',
    fontsize=9,
    color=GREY,
  )
  return figure


def _draw_ways(
  axes: Axes,
  report: GroupReport,
  places: Callable[[Curve], Sequence[float]],
  label: str,
  *,
  theory: bool = False,
) -> None:
  """All ways but the sweep of lags."""
  colours = {1: 'black', **dict(zip(report.sizes, COLOURS * 9, strict=False))}
  for curve in report.curves:
    if curve.way == LAG:
      continue
    name = _NAMES[curve.way] + ('' if curve.way == CHAIN else f', {curve.thinkers} thinkers')
    style, colour = _STYLES.get(curve.way, '-'), colours[curve.thinkers]
    x = places(curve)
    axes.plot(x, curve.coverage, style, color=colour, label=name, linewidth=1.8)
    axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)
    if theory and curve.theory is not None and curve.way in (GROUP, INDEPENDENT):
      axes.plot(x, curve.theory, '.', color=colour, markersize=3, alpha=0.7)
  if theory and any(curve.theory is not None for curve in report.curves):
    axes.plot([], [], '.', color=GREY, label='choice at random among the unseen')
  _finish(axes, label)


def _draw_time(axes: Axes, report: GroupReport) -> None:
  if any(curve.step_ms is None for curve in report.curves):
    axes.text(0.5, 0.5, 'times were not taken', ha='center', transform=axes.transAxes, color=GREY)
    _finish(axes, 'milliseconds')
    return
  _draw_ways(
    axes,
    report,
    lambda curve: [step * (curve.step_ms or 0) for step in range(len(curve.coverage))],
    'milliseconds (tokens of each thinker x measured time of a step)',
  )


def _draw_lags(axes: Axes, report: GroupReport) -> None:
  """The largest group, seeing the others later and later."""
  size = report.sizes[-1]
  sweep = [curve for curve in report.curves if curve.way == LAG and curve.thinkers == size]
  if not sweep:
    axes.text(0.5, 0.5, 'lags: add --baselines', ha='center', transform=axes.transAxes, color=GREY)
    _finish(axes, 'tokens of each thinker')
    return
  ways = [report.curve(GROUP, size), *sweep, report.curve(MASK_OFF, size)]
  for number, curve in enumerate(ways):
    shade = number / len(ways)
    lag = 'never' if curve.way == MASK_OFF else f'{curve.lag or 0} steps late'
    axes.plot(curve.coverage, color=(shade, 0.35, 1 - shade), label=f'seen {lag}', linewidth=1.6)
    axes.fill_between(
      range(len(curve.coverage)),
      curve.low,
      curve.high,
      color=(shade, 0.35, 1 - shade),
      alpha=0.12,
      linewidth=0,
    )
  _finish(axes, f'tokens of each thinker, {size} thinkers that see each other late')
  axes.legend(fontsize=8.5, loc='lower right')


def _finish(axes: Axes, label: str) -> None:
  axes.set_xlabel(label)
  axes.set_ylim(0, 1.03)
  axes.set_xlim(left=0)
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.grid(alpha=0.3)
