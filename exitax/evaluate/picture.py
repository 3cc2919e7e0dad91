"""The speed-quality picture: what an exit threshold costs in quality and buys in layers and time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from exitax.evaluate.report import EvaluationReport
from exitax.evaluate.thresholds import ThresholdRow

DPI = 130
# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = _MAIN, _SECOND, _THIRD = '#0072B2', '#D55E00', '#009E73'
GREY = '#555555'
_LABELLED = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def draw_report(report: EvaluationReport) -> Figure:
  """The picture as a figure of its own, outside pyplot's state."""
  figure = Figure(figsize=(13, 10), layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1))
  _draw_depth(figure.add_subplot(grid[0, 0]), report)
  speed_grid = grid[0, 1].subgridspec(2, 1)
  quality = figure.add_subplot(speed_grid[0])
  _draw_speed(quality, figure.add_subplot(speed_grid[1], sharex=quality), report)
  _draw_shares(figure.add_subplot(grid[1, :]), report)
  figure.suptitle(_title(report), fontsize=15)
  figure.supxlabel(_footnote(report), fontsize=9, color=GREY)
  return figure


def to_png(figure: Figure) -> bytes:
  """The figure as the content of a PNG file."""
  out = io.BytesIO()
  figure.savefig(out, format='png', dpi=DPI)
  return out.getvalue()


def _title(report: EvaluationReport) -> str:
  exits = ', '.join(str(depth) for depth in report.model.depths[:-1])
  return (
    f'Speed and quality of early exit: {report.model.num_layers} layers, '
    f'{f"exits after {exits}" if exits else "no exits"}, training step {report.model.step:,}'
  )


def _footnote(report: EvaluationReport) -> str:
  data, machine = report.data, report.machine
  return (
    f'{data.tokens:,} held-out tokens of {", ".join(data.tasks)}, '
    f'{data.bytes_per_token:.2f} bytes per token.   '
    f'{machine.processor}, {machine.cores} cores, {machine.devices} x {machine.device}, '
    f'jax {machine.jax}, {machine.date[:10]}'
  )


def _draw_depth(axes: Axes, report: EvaluationReport) -> None:
  """Quality against effective layers: thresholds of every measure, fixed exits, the oracle."""
  for name, colour in zip(report.confidences, COLOURS * 9, strict=False):
    rows = report.rows_of(name)
    main = name == report.confidences[0]
    axes.plot(
      [row.effective_layers for row in rows],
      [row.bits_per_byte for row in rows],
      marker='o' if main else None,
      markersize=4,
      linewidth=2 if main else 1.2,
      linestyle='-' if main else '--',
      color=colour,
      label=f'threshold on {name}',
      zorder=3 if main else 2,
    )
  axes.scatter(
    [score.layer for score in report.exits],
    [score.bits_per_byte for score in report.exits],
    marker='s',
    s=70,
    facecolor='white',
    edgecolor='black',
    linewidth=1.5,
    label='fixed exit',
    zorder=4,
  )
  for score in report.exits:
    axes.annotate(
      _exit_label(score.name),
      (score.layer, score.bits_per_byte),
      xytext=(0, 10),
      textcoords='offset points',
      ha='center',
      fontweight='bold',
    )
  axes.scatter(
    [report.oracle.effective_layers],
    [report.oracle.bits_per_byte],
    marker='*',
    s=150,
    color='#CC79A7',
    edgecolor='black',
    linewidth=0.6,
    label='oracle (first exit that agrees with final)',
    zorder=4,
  )
  main_rows = report.rows_of(report.confidences[0])
  _label_thresholds(axes, main_rows, [row.effective_layers for row in main_rows])
  axes.set_title('Quality by depth (lower is better)')
  axes.set_xlabel('effective layers per token')
  axes.set_ylabel('bits per byte')
  nats = math.log(2) * report.data.bytes_per_token
  to_loss, to_bits = _times(nats), _times(1 / nats)
  loss = axes.secondary_yaxis('right', functions=(to_loss, to_bits))
  loss.set_ylabel('loss (nats per token)')
  axes.margins(x=0.1, y=0.12)
  low, high = axes.get_ylim()
  if high - low < 0.02:  # One exit, or exits that are all alike: do not magnify rounding.
    middle = (low + high) / 2
    axes.set_ylim(middle - 0.05, middle + 0.05)
  axes.grid(alpha=0.3)
  _legend_below(axes, distance=0.14, columns=2)


def _times(factor: float) -> Callable[[ArrayLike], ArrayLike]:
  return lambda values: np.multiply(values, factor)


def _exit_label(name: str) -> str:
  return name.replace('_', ' ')


def _legend_below(axes: Axes, *, distance: float, columns: int) -> None:
  """A legend under the x label (`distance` in heights of the axes), where no data can be."""
  axes.legend(
    loc='upper center',
    bbox_to_anchor=(0.5, -distance),
    ncols=columns,
    fontsize=9,
    frameon=False,
  )


def _label_thresholds(axes: Axes, rows: Sequence[ThresholdRow], places: Sequence[float]) -> None:
  """Writes thresholds below points of a curve at x `places`, leaving out those that would collide."""
  apart = 0.06 * max(max(places) - min(places), 1e-9)
  # The ends stand beside fixed exits, which have labels of their own.
  taken = [max(places), min(places)]
  for row, place in zip(rows, places, strict=True):
    if row.threshold in _LABELLED and all(abs(place - x) > apart for x in taken):
      taken.append(place)
      axes.annotate(
        f'{row.threshold:g}',
        (place, row.bits_per_byte),
        xytext=(0, -15),
        textcoords='offset points',
        ha='center',
        fontsize=8.5,
        color=_MAIN,
      )


def _draw_speed(quality: Axes, agreement: Axes, report: EvaluationReport) -> None:
  """Quality and agreement against the speed-up of decoding."""
  quality.set_title('Quality by wall-clock speed-up')
  quality.set_ylabel('bits per byte')
  agreement.set_ylabel('agreement with\nthe final layer')
  agreement.set_xlabel('speed-up over decoding with all layers (x)')
  if report.speed is None or not report.speed.rows:
    for axes in (quality, agreement):
      axes.text(0.5, 0.5, 'not measured', ha='center', color=GREY, transform=axes.transAxes)
      axes.set(xticks=[], yticks=[])
    return
  rows = report.rows_of(report.speed.confidence)
  pairs = [(row, speed) for row in rows if (speed := report.speed_of(row)) is not None]
  speed_up = [speed.speed_up for _, speed in pairs]
  quality.plot(
    speed_up,
    [row.bits_per_byte for row, _ in pairs],
    marker='o',
    markersize=4,
    color=_MAIN,
  )
  _label_thresholds(quality, [row for row, _ in pairs], speed_up)
  agreement.plot(
    speed_up,
    [row.agreement for row, _ in pairs],
    marker='o',
    markersize=4,
    color=_MAIN,
    label='each held-out token',
  )
  agreement.plot(
    speed_up,
    [speed.agreement for _, speed in pairs],
    marker='^',
    markersize=4,
    linestyle='--',
    color=_SECOND,
    label='generated text',
  )
  for axes in (quality, agreement):
    axes.axvline(1, color=GREY, linewidth=1, linestyle=':', label='full decoding')
    axes.grid(alpha=0.3)
  _legend_below(agreement, distance=0.24, columns=3)
  agreement.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  agreement.set_ylim(-0.03, 1.05)
  quality.margins(y=0.2)
  quality.tick_params(labelbottom=False)


def _draw_shares(axes: Axes, report: EvaluationReport) -> None:
  """Share of tokens that leave at each exit, stacked, by threshold of the main measure."""
  rows = report.rows_of(report.confidences[0])
  thresholds = [row.threshold for row in rows]
  shares = np.array([row.exit_shares for row in rows]).T
  names = [_exit_label(score.name) for score in report.exits]
  colours = _depth_colours(len(names))
  width = 0.8 * _spacing(thresholds)
  bottom = np.zeros(len(rows))
  for name, share, colour in zip(names, shares, colours, strict=True):
    axes.bar(thresholds, share, width, bottom=bottom, label=name, color=colour)
    bottom += share
  axes.set_title('Where tokens leave, by threshold')
  axes.set_xlabel(f'threshold on {report.confidences[0]}: a token leaves where it is above')
  axes.set_ylabel('share of tokens')
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.set_ylim(0, 1)
  axes.margins(x=0.01)
  axes.set_xticks(thresholds if len(thresholds) <= 21 else np.linspace(0, 1, 11))
  axes.invert_xaxis()
  axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), title='leaves at', fontsize=9)


def _spacing(values: Sequence[float]) -> float:
  """The smallest distance between two values; 0.1 for a single one."""
  return float(np.min(np.abs(np.diff(sorted(values))))) if len(values) > 1 else 0.1


def _depth_colours(count: int) -> list[Any]:
  """From light (shallow) to dark (deep)."""
  from matplotlib import colormaps

  return [colormaps['viridis_r'](x) for x in np.linspace(0.85, 0.08, count)[::-1]]
