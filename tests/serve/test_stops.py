"""Stop strings over token borders, against searching the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitax.serve.jobs import Token
from exitax.serve.stops import Piece, StopScanner


def piece(text: str) -> Piece:
  return Piece(text, Token(0, exit_layer=1, confidence=0.5, log_prob=-1.0))


def run(texts, stops) -> tuple[list[list[str]], bool]:
  """What each push, and last the end, lets out."""
  scanner = StopScanner(stops)
  shown = [[p.text for p in scanner.push(piece(text))] for text in texts]
  return [*shown, [p.text for p in scanner.finish()]], scanner.stopped


@pytest.mark.parametrize(
  ('texts', 'stops', 'shown'),
  [
    (['a', ' E', 'N', 'X'], ['END'], [['a'], [], [], [' E', 'N', 'X'], []]),
    (['a', ' E', 'N', 'D.'], ['END'], [['a'], [], [], [' '], []]),
    (['a', 'b'], [], [['a'], ['b'], []]),
    (['ab', 'c'], ['b'], [['a'], [], []]),
    (['a', 'b'], ['ab'], [[], [], []]),
    (['a', 'b'], ['abc'], [[], [], ['a', 'b']]),
    (['x', '', 'y'], ['z'], [['x'], [''], ['y'], []]),
    (['aa', 'ab'], ['aab'], [[], ['a'], []]),
    (['\n', 'User', ':'], ['\nUser:', 'r:'], [[], [], [], []]),
  ],
)
def test_examples(texts, stops, shown):
  assert run(texts, stops)[0] == shown


letters = st.text('ab', min_size=0, max_size=4)


@settings(deadline=None)
@given(st.lists(letters, max_size=12), st.lists(letters.filter(bool), max_size=3))
def test_what_is_shown_is_the_text_before_the_first_stop(texts, stops):
  shown, stopped = run(texts, stops)
  released = ''.join(text for part in shown for text in part)
  so_far = ''
  for text in texts:
    so_far += text
    found = [so_far.index(stop) for stop in stops if stop in so_far]
    if found:
      assert stopped
      assert released == so_far[: min(found)]
      return
  assert not stopped
  assert released == ''.join(texts)


@settings(deadline=None)
@given(st.lists(letters, max_size=12), st.lists(letters.filter(bool), max_size=3))
def test_nothing_is_held_without_need(texts, stops):
  scanner, shown, all_text = StopScanner(stops), '', ''
  for text in texts:
    all_text += text
    shown += ''.join(p.text for p in scanner.push(piece(text)))
    if scanner.stopped:
      return
    held = all_text[len(shown) :]
    starts = {stop[:size] for stop in stops for size in range(1, len(stop))}
    assert not held or any(held.endswith(start) for start in starts)
