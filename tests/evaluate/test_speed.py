from __future__ import annotations

import itertools

import numpy as np
import pytest

from exitax.evaluate import Decoded, measure_speed

FULL_TEXT = {0: [1, 2, 3, 4], 1: [5, 6, 7, 8]}
EARLY_TEXT = {0: [1, 2, 0, 4], 1: [0, 6, 7, 8]}


class FakeDecoder:
  """Takes 4 seconds a prompt without exits, 2 at a threshold of 0; slower with every call."""

  def __init__(self, drift: float = 0.0):
    self.calls = []
    self._drift = drift

  def __call__(self, prompt: int, threshold: float | None) -> Decoded:
    slower = 1 + self._drift * len(self.calls)
    self.calls.append((prompt, threshold))
    early = threshold == 0
    return Decoded(
      tokens=np.array((EARLY_TEXT if early else FULL_TEXT)[prompt]),
      exit_layers=np.full(4, 2 if early else 6),
      layer_passes=10 if early else 24,
      seconds=(2.0 if early else 4.0) * slower,
    )


def measure(decoder, **changes):
  settings = {
    'thresholds': (1.0, 0.0),
    'confidence': 'max_prob',
    'prompts': 2,
    'prompt_tokens': 5,
    'repeats': 3,
    'max_seconds': 1e9,
  }
  return measure_speed(decoder, **{**settings, **changes})


def test_times_depth_and_agreement():
  report = measure(FakeDecoder())
  assert (report.prompts, report.prompt_tokens, report.new_tokens) == (2, 5, 4)
  assert report.repeats == 3
  assert report.full_tokens_per_second == 1.0  # 8 tokens in 8 seconds.
  full, early = report.rows
  assert (full.threshold, full.speed_up, full.tokens_per_second) == (1.0, 1.0, 1.0)
  assert (full.agreement, full.matching_prefix, full.effective_layers) == (1.0, 4.0, 6.0)
  assert full.layer_passes == 6.0
  assert (early.threshold, early.speed_up, early.tokens_per_second) == (0.0, 2.0, 2.0)
  assert early.agreement == 6 / 8
  assert early.matching_prefix == (2 + 0) / 2
  assert early.effective_layers == 2.0
  assert early.layer_passes == 20 / 8


def test_settings_take_turns_and_every_other_repeat_goes_backwards():
  decoder = FakeDecoder()
  measure(decoder)
  warm_up, timed = decoder.calls[:2], decoder.calls[2:]
  assert warm_up == [(0, None), (0, 1.0)]  # One call for each compiled program.
  order = [None, 1.0, 0.0]
  laps = [order, order[::-1], order]
  assert timed == [(prompt, s) for lap in laps for s in lap for prompt in (0, 1)]


def test_a_machine_that_slows_down_does_not_change_the_speed_up_much():
  report = measure(FakeDecoder(drift=0.05), repeats=4)
  assert [row.speed_up for row in report.rows] == pytest.approx([1.0, 2.0], rel=0.06)


@pytest.mark.parametrize(('limit', 'repeats'), [(0, 1), (39, 1), (40, 2), (60, 3), (1e9, 9)])
def test_no_repeat_begins_that_would_end_too_late(limit, repeats):
  assert measure(FakeDecoder(), repeats=9, max_seconds=limit).repeats == repeats


def test_progress_sees_every_setting_of_every_repeat():
  seen = []

  def progress(items, *, total, label):
    items = list(items)
    seen.append((len(items), total, label))
    return iter(items)

  measure(FakeDecoder(), repeats=2, progress=progress)
  assert seen == [(3, 3, f'timing decoding, {n} of 2') for n in (1, 2)]


def test_without_thresholds_full_decoding_is_still_timed():
  report = measure(FakeDecoder(), thresholds=())
  assert report.rows == ()
  assert report.full_tokens_per_second == 1.0


def test_tokens_per_second_is_of_the_median_repeat():
  durations = itertools.chain([1.0], [4.0, 9.0, 2.0])

  def decode_fn(prompt, threshold):
    return Decoded(
      tokens=np.zeros(8), exit_layers=np.ones(8), layer_passes=8, seconds=next(durations)
    )

  assert measure(decode_fn, thresholds=(), prompts=1).full_tokens_per_second == 8 / 4
