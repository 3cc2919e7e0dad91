"""The picture of a calibration: risk and its bound by threshold, and what each threshold saves."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from exitax.evaluate.calibration.config import Method
from exitax.evaluate.calibration.report import CalibrationReport
from exitax.evaluate.picture import COLOURS, GREY

_LEAST_SHOWN = 4.0  # Times the limit: risks far above say nothing more.


def draw_calibration(report: CalibrationReport) -> Figure:
  """The picture as a figure of its own, outside pyplot's state."""
  figure = Figure(figsize=(10, 8), layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.add_gridspec(2, 1, height_ratios=(1.6, 1))
  risk = figure.add_subplot(grid[0])
  _draw_risk(risk, report)
  _draw_layers(figure.add_subplot(grid[1], sharex=risk), report)
  figure.suptitle(_title(report), fontsize=14)
  figure.supxlabel(
    f'{report.decision.examples} of {report.population}; step {report.model.step}, '
    f'{report.config.strategy.value}, {report.machine.date[:10]}',
    fontsize=9,
    color=GREY,
  )
  return figure


def _title(report: CalibrationReport) -> str:
  threshold, config = report.decision.threshold, report.config
  if threshold is None:
    return f'Nothing certified: {report.decision.examples} examples do not bound the risk by {config.risk:g}'
  how = f'confidence {config.confidence:g}' if config.method is Method.LTT else 'in expectation'
  return f'Threshold {threshold:g} is certified: risk at most {config.risk:g}, {how}'


def _draw_risk(axes: Axes, report: CalibrationReport) -> None:
  rows, config = report.decision.rows, report.config
  thresholds = [row.threshold for row in rows]
  bound = (
    f'upper bound, confidence {config.confidence:g}'
    if config.method is Method.LTT
    else '(n risk + 1) / (n + 1)'
  )
  axes.plot(
    thresholds, [row.bound for row in rows], 'v--', color=COLOURS[1], label=bound, markersize=5
  )
  axes.plot(
    thresholds, [row.risk for row in rows], 'o-', color=COLOURS[0], label='measured', markersize=5
  )
  axes.axhline(config.risk, color=GREY, linestyle=':', label=f'limit {config.risk:g}')
  _mark(axes, report)
  seen = [config.risk, *(max(row.risk, row.bound) for row in rows)]
  axes.set_ylim(-0.04 * config.risk, min(max(seen), _LEAST_SHOWN * config.risk) * 1.05)
  axes.set_ylabel(report.loss, wrap=True)
  axes.set_title('Risk by threshold (lower is better)', fontsize=12)
  axes.grid(alpha=0.3)
  axes.legend(loc='upper left', fontsize=9)
  axes.tick_params(labelbottom=False)


def _draw_layers(axes: Axes, report: CalibrationReport) -> None:
  thresholds = [row.threshold for row in report.decision.rows]
  axes.plot(thresholds, report.layers, 'o-', color=COLOURS[2], markersize=5)
  _mark(axes, report)
  axes.set_ylim(0, report.model.num_layers * 1.05)
  axes.set_ylabel('layers per token')
  axes.set_xlabel(
    f'threshold on {report.config.measure.value}: a token leaves where it is above; tested from left to right'
  )
  axes.grid(alpha=0.3)
  axes.invert_xaxis()


def _mark(axes: Axes, report: CalibrationReport) -> None:
  if report.decision.threshold is not None:
    axes.axvline(
      report.decision.threshold, color='black', linewidth=1.2, label='certified threshold'
    )
