"""Texts that come, go and are spoken to while their group thinks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from exitax import decode
from exitax.decode import Group, GroupRun, Sampler, Sees, Spare, ThinkConfig, Thinker
from exitax.errors import UserError
from exitax.layers import Precision
from tests.decode.group_oracle import expected_scores, record

WARM = Sampler(temperature=1.5)
CONFIG = {'max_new_tokens': 9, 'slot_width': 14}
LATER = Thinker(
  header=(40, 41, 42), number=7, slot=2, rank=2, seed=9, sampler=WARM, max_new_tokens=5
)
SPARE = Spare(texts=1, tokens=12)


@pytest.fixture
def exact(x64, tiny):
  return tiny(precision=Precision.FLOAT64, num_layers=3)


def pair(mode: str) -> Group:
  thinkers = [Thinker(header=(20 + i,), seed=i, sampler=WARM) for i in range(2)]
  return Group(prompt=[2, 7, 1], thinkers=thinkers, sees=Sees.parse(mode))


def check(model, params, mode, scheme, fed, **more):
  """All scores against one masked forward over everything that was fed."""
  group = dataclasses.replace(pair(mode), thinkers=[*pair(mode).thinkers, LATER])
  wanted = expected_scores(
    model, params, group, mode, fed, positions=scheme, width=CONFIG['slot_width'], **more
  )
  found = np.stack([item.scores for item in fed])
  assert np.abs(found - wanted[-1]).max() <= 1e-12 * np.abs(wanted[-1]).max()


@pytest.mark.parametrize('scheme', ['slots', 'shared'])
@pytest.mark.parametrize('mode', ['full', 'interleaved', 'lag:3', 'none'])
def test_a_thinker_that_joins_sees_what_it_may(exact, mode, scheme):
  model, params = exact
  run = GroupRun(model, params, [pair(mode)], ThinkConfig(positions=scheme, **CONFIG), spare=SPARE)
  fed = record(run, 5)  # Steps -1 to 3.
  run.start(2, 0, LATER)
  fed += record(run)
  own = [item.step for item in fed if item.text == 2]
  assert own == list(range(len(own))) and len(own) >= 7
  check(model, params, mode, scheme, fed, starts={2: 4})


@pytest.mark.parametrize('scheme', ['slots', 'shared'])
@pytest.mark.parametrize('mode', ['full', 'none'])
def test_the_one_that_sums_up_sees_everything(exact, mode, scheme):
  model, params = exact
  run = GroupRun(model, params, [pair(mode)], ThinkConfig(positions=scheme, **CONFIG), spare=SPARE)
  fed = record(run)
  fed += record(
    run, 1, at_least=1
  )  # As `start` does by itself: both thinkers' last tokens are fed.
  steps = max(item.step for item in fed) + 1
  run.start(2, 0, LATER, sees_all=True)
  fed += record(run)
  assert [sum(item.text == text and item.step >= 0 for item in fed) for text in (0, 1)] == [10, 10]
  check(model, params, mode, scheme, fed, starts={2: steps}, sees_all=[2])


def test_last_tokens_are_fed_before_one_begins_that_sums_up(exact):
  model, params = exact
  texts = []
  for fed_before in (False, True):
    run = GroupRun(model, params, [pair('full')], ThinkConfig(**CONFIG), spare=SPARE)
    run.finish()
    if fed_before:
      record(run, 1, at_least=1)
    run.start(2, 0, LATER, sees_all=True)
    texts.append(run.advance(20)[2])
  np.testing.assert_array_equal(texts[0].tokens, texts[1].tokens)
  np.testing.assert_array_equal(texts[0].log_probs, texts[1].log_probs)


def test_tokens_that_are_given_are_fed_like_own_ones(exact):
  model, params = exact
  run = GroupRun(model, params, [pair('full')], ThinkConfig(**CONFIG), spare=SPARE)
  fed = record(run, 4)
  run.give(1, [44, 45])
  fed += record(run)
  check(model, params, 'full', 'slots', fed)
  first, second = decode.completions_since(run.state, np.zeros(3, int))[:2]
  assert (len(first.tokens), len(second.tokens)) == (9, 11)  # The budget is of own tokens.
  (at,) = np.flatnonzero(second.exit_layers == decode.GIVEN)[:1]
  assert second.tokens[at : at + 2].tolist() == [44, 45]
  assert [item.token for item in fed if item.text == 1 and item.step >= 0][at + 1 : at + 3] == [
    44,
    45,
  ]


def test_a_text_that_is_stopped_is_silent_and_stays_visible(exact):
  model, params = exact
  run = GroupRun(model, params, [pair('full')], ThinkConfig(**CONFIG))
  fed = record(run, 5)
  run.stop([0])
  fed += record(run)
  check(model, params, 'full', 'slots', fed)
  ended = [item.step for item in fed if item.text == 0]
  assert ended[-1] == 4  # What it had chosen last was fed once more.
  reasons = [decode.StopReason(int(reason)) for reason in run.state.stop_reason]
  assert reasons == [decode.StopReason.STOPPED, decode.StopReason.BUDGET]


@pytest.mark.parametrize(
  ('text', 'changes', 'words'),
  [
    (0, {}, 'text 0 has not ended'),
    (2, {'header': ()}, 'needs a header, a number and a slot'),
    (2, {'number': None}, 'needs a header, a number and a slot'),
    (2, {'max_new_tokens': 10}, '13 tokens exceed the room for 12 that group 0 has left'),
    (2, {'slot': 9}, '8 tokens of a new text end at position 137, beyond the context of 128'),
  ],
)
def test_bad_new_texts_are_named(tiny, text, changes, words):
  run = GroupRun(*tiny(), [pair('full')], ThinkConfig(**CONFIG), spare=SPARE)
  with pytest.raises(UserError, match=words):
    run.start(text, 0, dataclasses.replace(LATER, **changes))


def test_room_is_taken_once(tiny):
  """Late texts, and words that are given, share what was kept free; what does not fit is refused."""
  run = GroupRun(*tiny(), [pair('full')], ThinkConfig(**CONFIG), spare=SPARE)
  run.give(0, [5, 6])
  with pytest.raises(UserError, match='9 more tokens make 21 in a slot of 14'):
    run.give(0, [5] * 9)
  run.start(2, 0, LATER)
  with pytest.raises(UserError, match='3 tokens exceed the room for 2 that group 0 has left'):
    run.give(2, [5] * 3)
