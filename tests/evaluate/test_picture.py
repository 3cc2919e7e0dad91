from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from exitax.evaluate.picture import draw_report, to_png
from tests.evaluate.conftest import make_report


@pytest.fixture(scope='module')
def figure():
  return draw_report(make_report())


def panel(figure, title):
  return next(axes for axes in figure.axes if axes.get_title() == title)


def line(axes, label):
  return next(item for item in axes.get_lines() if item.get_label() == label)


def test_title_and_footnote_say_what_and_where(figure):
  title, footnote = figure.get_suptitle(), figure.get_supxlabel()
  assert title == 'Speed and quality of early exit: 4 layers, exits after 1, 2, training step 7'
  for fact in ('400 held-out tokens of words', '2.00 bytes per token', 'Abacus, 2 cores'):
    assert fact in footnote


def test_quality_by_depth_shows_thresholds_and_fixed_exits(figure):
  report = make_report()
  axes = panel(figure, 'Quality by depth (lower is better)')
  assert axes.get_xlabel() == 'effective layers per token'
  assert axes.get_ylabel() == 'bits per byte'
  for name in ('max_prob', 'margin'):
    curve = line(axes, f'threshold on {name}')
    rows = report.rows_of(name)
    np.testing.assert_allclose(curve.get_xdata(), [row.effective_layers for row in rows])
    np.testing.assert_allclose(curve.get_ydata(), [row.bits_per_byte for row in rows])
  fixed = next(c for c in axes.collections if c.get_label() == 'fixed exit')
  np.testing.assert_allclose(fixed.get_offsets(), [[1, 2.0], [2, 1.5], [4, 1.0]])
  texts = {text.get_text() for text in axes.texts}
  assert {'exit 1', 'exit 2', 'final', '0.9', '0.5'} <= texts


def test_the_right_scale_is_the_loss(figure):
  axes = panel(figure, 'Quality by depth (lower is better)')
  (loss,) = axes.child_axes
  figure.draw_without_rendering()
  assert loss.get_ylabel() == 'loss (nats per token)'
  np.testing.assert_allclose(loss.get_ylim(), np.multiply(axes.get_ylim(), np.log(2) * 2.0))


def test_quality_and_agreement_by_speed_up(figure):
  quality = panel(figure, 'Quality by wall-clock speed-up')
  agreement = next(a for a in figure.axes if 'agreement' in a.get_ylabel())
  assert agreement.get_xlabel() == 'speed-up over decoding with all layers (x)'
  curve = line(agreement, 'generated text')
  np.testing.assert_allclose(curve.get_xdata(), [1.0, 1.25, 1.5, 1.75])
  np.testing.assert_allclose(curve.get_ydata(), [1.0, 0.8, 0.6, 0.4])
  np.testing.assert_allclose(quality.get_lines()[0].get_xdata(), [1.0, 1.25, 1.5, 1.75])


def test_shares_are_stacked_to_one(figure):
  axes = panel(figure, 'Where tokens leave, by threshold')
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  assert labels == ['exit 1', 'exit 2', 'final']
  tops = {}
  for bar in axes.patches:
    place = round(bar.get_x() + bar.get_width() / 2, 6)
    tops[place] = max(tops.get(place, 0), bar.get_y() + bar.get_height())
  assert sorted(tops) == [0.0, 0.5, 0.9, 1.0]
  assert list(tops.values()) == pytest.approx([1.0] * 4)


def test_no_legend_covers_data(figure):
  figure.draw_without_rendering()
  for axes in figure.axes:
    if axes.get_legend() is not None:
      assert not axes.get_legend().get_window_extent().overlaps(axes.bbox)


def test_png_has_the_promised_size(figure):
  png = to_png(figure)
  width, height = (int.from_bytes(png[i : i + 4], 'big') for i in (16, 20))
  assert (width, height) == (13 * 130, 10 * 130)


def test_without_times_the_panels_say_so():
  figure = draw_report(make_report(timed=False))
  texts = [text.get_text() for axes in figure.axes for text in axes.texts]
  assert texts.count('not measured') == 2


def test_a_model_without_exits_can_be_drawn():
  report = make_report(timed=False)
  rows = tuple(
    dataclasses.replace(row, exit_shares=(1.0,), effective_layers=4.0, bits_per_byte=1.0)
    for row in report.thresholds
  )
  report = dataclasses.replace(
    report,
    model=dataclasses.replace(report.model, depths=(4,)),
    exits=report.exits[-1:],
    exit_agreement=(1.0,),
    thresholds=rows,
    oracle=dataclasses.replace(report.oracle, effective_layers=4.0, bits_per_byte=1.0),
  )
  figure = draw_report(report)
  to_png(figure)
  assert 'no exits' in figure.get_suptitle()
  low, high = panel(figure, 'Quality by depth (lower is better)').get_ylim()
  assert high - low > 0.05


def test_matplotlib_is_not_imported_before_it_is_needed(subprocess_env):
  program = 'import exitax.evaluate, sys; print("matplotlib" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', program], env=subprocess_env, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == 'False'
