"""Group Think: the ten invariants of concurrent decoding, in float64 where they are about numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exitax import decode
from exitax.decode import Group, GroupRun, Sampler, Sees, ThinkConfig, Thinker, think
from exitax.errors import UserError
from exitax.layers import Precision
from tests.decode.group_oracle import (
  expected_in_views,
  expected_scores,
  masked_forward,
  run_groups,
)

MODES = ('full', 'interleaved', 'strict', 'lag:3', 'none')
SCHEMES = ('slots', 'shared')
TOLERANCE = 1e-12
WARM = Sampler(temperature=1.5)
PROMPTS = ([3, 1, 4, 1, 5, 9], [2, 7, 1])


@pytest.fixture
def exact(x64, tiny):
  """A model in float64; its scores are of the order of 1."""
  return tiny(precision=Precision.FLOAT64, num_layers=3)


def trio(mode: str, prompt=PROMPTS[0], **changes) -> Group:
  thinkers = [
    Thinker(header=header, seed=10 + i, sampler=WARM, **changes)
    for i, header in enumerate([(11,), (12, 13), (14,)])
  ]
  return Group(prompt=prompt, thinkers=thinkers, sees=Sees.parse(mode))


def pair(mode: str, prompt=PROMPTS[1]) -> Group:
  thinkers = [Thinker(header=(20 + i,), seed=i, sampler=WARM) for i in range(2)]
  return Group(prompt=prompt, thinkers=thinkers, sees=Sees.parse(mode))


def texts_of(state) -> list[list[int]]:
  return [
    completion.tokens.tolist() for completion in decode.completions_since(state, np.zeros(64, int))
  ]


def split(groups, fed):
  """What each group's thinkers fed, with their places in it."""
  first = 0
  for group in groups:
    stop = first + len(group.thinkers)
    yield (
      group,
      [
        dataclasses.replace(item, text=item.text - first)
        for item in fed
        if first <= item.text < stop
      ],
    )
    first = stop


# 1. One thinker is ordinary decoding.


@pytest.mark.parametrize('scheme', ['slots', 'shared', 'rotated'])
@pytest.mark.parametrize(('mode', 'sampler'), [('full', Sampler()), ('none', WARM)])
def test_one_thinker_is_ordinary_decoding(exact, mode, sampler, scheme):
  model, params = exact
  expected = decode.generate(
    model, params, PROMPTS, max_new_tokens=12, sampler=sampler, seed=5, stop_tokens=(7,)
  )
  groups = [
    Group(prompt=prompt, thinkers=[Thinker(seed=5 + i, sampler=sampler)], sees=Sees.parse(mode))
    for i, prompt in enumerate(PROMPTS)
  ]
  config = ThinkConfig(max_new_tokens=12, positions=scheme)
  found = think(model, params, groups, config, stop_tokens=(7,))
  for (ours,), theirs in zip(found, expected.completions, strict=True):
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-6)
    assert ours.stop_reason == theirs.stop_reason
  # A header is a prompt's end.
  headed = [
    dataclasses.replace(
      group,
      prompt=group.prompt[:-1],
      thinkers=[dataclasses.replace(group.thinkers[0], header=group.prompt[-1:])],
    )
    for group in groups
  ]
  again = think(model, params, headed, config, stop_tokens=(7,))
  assert [x.tokens.tolist() for (x,) in again] == expected.tokens


# 2. The cache against one forward without it.


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('mode', MODES)
def test_cached_scores_are_those_of_one_masked_forward(exact, mode, scheme):
  model, params = exact
  groups = [trio(mode), pair(mode)]
  config = ThinkConfig(max_new_tokens=9, positions=scheme, slot_width=14)
  # Some texts end in the middle of the run.
  _, fed = run_groups(model, params, groups, config, stop_tokens=range(30, 36))
  for group, own in split(groups, fed):
    wanted = expected_scores(model, params, group, mode, own, positions=scheme, width=14)[-1]
    found = np.stack([item.scores for item in own])
    assert np.abs(found - wanted).max() <= TOLERANCE * max(np.abs(wanted).max(), 1)


@pytest.mark.parametrize('mode', MODES)
def test_rotated_queries_read_each_text_in_the_thinkers_own_order(exact, mode):
  model, params = exact
  groups = [trio(mode), pair(mode)]
  config = ThinkConfig(max_new_tokens=6, positions='rotated')
  _, fed = run_groups(model, params, groups, config, stop_tokens=range(30, 33))
  for group, own in split(groups, fed):
    wanted = expected_in_views(model, params, group, mode, own)
    found = np.stack([item.scores for item in own])
    assert np.abs(found - wanted).max() <= TOLERANCE * max(np.abs(wanted).max(), 1)


def test_a_text_ends_in_the_middle_and_the_others_see_its_end(exact):
  model, params = exact
  config = ThinkConfig(max_new_tokens=9, slot_width=14)
  state, fed = run_groups(model, params, [trio('full')], config, stop_tokens=range(30, 36))
  ends = [i for i in range(3) if state.stop_reason[i] == decode.StopReason.STOP_TOKEN]
  lengths = [len(text) for text in texts_of(state)]
  assert ends and max(lengths) > min(lengths)
  first = min(ends, key=lambda i: lengths[i])
  own = [item for item in fed if item.text == first and item.step >= 0]
  assert own[-1].token in range(30, 36)  # Fed once, then silent.
  assert len(own) == len(trio('full').thinkers[first].header) + lengths[first]


# 4. Interleaved is the causal mask.


@pytest.mark.parametrize('scheme', SCHEMES)
def test_interleaved_is_the_causal_forward_over_tokens_in_turns(exact, scheme):
  model, params = exact
  group = trio('interleaved')
  config = ThinkConfig(max_new_tokens=8, positions=scheme, slot_width=12)
  _, fed = run_groups(model, params, [group], config)
  own = [item for item in fed if item.step >= 0]  # Step after step, by rank within one.
  assert [(x.step, x.text) for x in own] == sorted((x.step, x.text) for x in own)
  prompt = list(group.prompt)
  shift = 12 if scheme == 'slots' else 0
  scores = masked_forward(
    model,
    params,
    [*prompt, *(x.token for x in own)],
    [*range(len(prompt)), *(len(prompt) + x.step + shift * x.text for x in own)],
    np.tri(len(prompt) + len(own), dtype=bool),
  )[-1]
  found = np.stack([item.scores for item in own])
  assert np.abs(found - scores[len(prompt) :]).max() <= TOLERANCE * np.abs(scores).max()


# 5. None is independent sampling on a shared prompt.


def test_none_with_shared_positions_is_so_many_separate_requests(exact):
  model, params = exact
  group = trio('none')
  config = ThinkConfig(max_new_tokens=10, positions='shared')
  _, fed = run_groups(model, params, [group], config)
  for number, thinker in enumerate(group.thinkers):
    alone = dataclasses.replace(group, thinkers=[dataclasses.replace(thinker, number=number)])
    _, expected = run_groups(model, params, [alone], config)
    own = [item for item in fed if item.text == number][: len(expected)]
    assert [x.token for x in own] == [x.token for x in expected]
    worst = max(np.abs(a.scores - b.scores).max() for a, b in zip(own, expected, strict=True))
    assert worst <= TOLERANCE * max(np.abs(x.scores).max() for x in own)


# 6. Nothing depends on array positions.


@settings(
  max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(3)), mode=st.sampled_from(MODES))
def test_permuting_thinkers_permutes_their_texts(tiny, order, mode):
  model, params = tiny()
  thinkers = [
    dataclasses.replace(item, number=i, slot=i, rank=i)
    for i, item in enumerate(trio(mode).thinkers)
  ]
  config = ThinkConfig(max_new_tokens=8)
  group = dataclasses.replace(trio(mode), thinkers=thinkers)
  (straight,) = think(model, params, [group], config)
  group = dataclasses.replace(group, thinkers=[thinkers[i] for i in order])
  (permuted,) = think(model, params, [group], config)
  for place, i in enumerate(order):
    assert permuted[place].tokens.tolist() == straight[i].tokens.tolist()


def _swapped(model, params, mode, scheme, *, keep) -> bool:
  """Whether swapping two thinkers, but for the field `keep`, swaps their texts."""
  one, two = (
    Thinker(header=(11 + i,), seed=10 + i, sampler=WARM, number=i, slot=i, rank=i) for i in range(2)
  )
  config = ThinkConfig(max_new_tokens=12, positions=scheme)

  def texts(*thinkers):
    group = Group(prompt=PROMPTS[0], thinkers=thinkers, sees=Sees.parse(mode))
    return [x.tokens.tolist() for x in think(model, params, [group], config)[0]]

  kept = {keep: getattr(one, keep)}, {keep: getattr(two, keep)}
  swapped = texts(dataclasses.replace(two, **kept[0]), dataclasses.replace(one, **kept[1]))
  return swapped[::-1] == texts(one, two)


@pytest.mark.parametrize(
  ('mode', 'scheme', 'keep', 'alike'),
  [
    ('full', 'shared', 'rank', True),
    ('strict', 'shared', 'rank', True),
    ('interleaved', 'shared', 'rank', False),
    ('full', 'slots', 'slot', False),
    ('full', 'shared', 'slot', True),
  ],
)
def test_what_must_be_permuted_with_the_thinkers(tiny, mode, scheme, keep, alike):
  assert _swapped(*tiny(), mode, scheme, keep=keep) == alike


# 7. When a token is seen.


@pytest.mark.parametrize(
  ('mode', 'seen_after'),
  # Steps after that of the changed token at which (lower rank, itself, higher rank) first differ.
  [
    ('full', (0, 0, 0)),
    ('strict', (1, 0, 1)),
    ('interleaved', (1, 0, 0)),
    ('lag:3', (3, 0, 3)),
    ('none', (None, 0, None)),
  ],
)
def test_a_changed_token_is_seen_when_it_may_be(exact, mode, seen_after):
  model, params = exact
  headers = np.arange(8, 8 + 24).reshape(3, 8)
  config = ThinkConfig(max_new_tokens=1, slot_width=10)

  def scores(headers):
    thinkers = [Thinker(header=tuple(map(int, header))) for header in headers]
    group = Group(prompt=PROMPTS[0], thinkers=thinkers, sees=Sees.parse(mode))
    _, fed = run_groups(model, params, [group], config)
    return {(item.text, item.step): item.scores for item in fed}

  before = scores(headers)
  headers[1, 2] += 17  # Thinker 1, step 2.
  after = scores(headers)
  for text, delay in enumerate(seen_after):
    for step in range(-1, 8):
      difference = np.abs(before[text, step] - after[text, step]).max()
      changed = delay is not None and step >= 2 + delay
      assert (difference > 1e-6) if changed else (difference == 0), (text, step, difference)


# 8. What must not matter.


@pytest.mark.parametrize('mode', ['full', 'interleaved'])
def test_a_short_run_begins_a_longer_one(tiny, mode):
  model, params = tiny()
  runs = [
    think(model, params, [trio(mode)], ThinkConfig(max_new_tokens=n, slot_width=20))[0]
    for n in (5, 16)
  ]
  for short, long in zip(*runs, strict=True):
    assert long.tokens[: len(short.tokens)].tolist() == short.tokens.tolist()


@pytest.mark.parametrize('mode', ['full', 'none'])
def test_neighbours_capacity_and_unused_cache_do_not_matter(exact, mode):
  model, params = exact
  config = ThinkConfig(max_new_tokens=9, slot_width=14)
  _, alone = run_groups(model, params, [pair(mode)], config)
  # Another group before it, a longer prompt in the batch (more columns), and everything unused poisoned.
  others = [trio(mode, prompt=[5, 6, 7, 8] * 10)]
  state, fed = run_groups(model, params, [*others, pair(mode)], config, poison=1e4)
  assert state.cache.columns.valid.shape[1] > 64
  together = list(split([*others, pair(mode)], fed))[1][1]
  # What is fed after a group's end, because others go on, changes nothing any more.
  together = together[: len(alone)]
  assert [x.token for x in together] == [x.token for x in alone]
  worst = max(np.abs(a.scores - b.scores).max() for a, b in zip(alone, together, strict=True))
  assert worst <= TOLERANCE * max(np.abs(x.scores).max() for x in alone)


def test_sizes_mix_in_one_batch(tiny):
  model, params = tiny()
  groups = [
    trio('full'),
    Group(prompt=PROMPTS[1], thinkers=[Thinker(seed=4, sampler=WARM)]),
    pair('lag:3'),
    Group(prompt=[9], thinkers=[Thinker()]),
  ]
  config = ThinkConfig(max_new_tokens=9)
  together = think(model, params, groups, config)
  for group, found in zip(groups, together, strict=True):
    (alone,) = think(model, params, [group], config)
    assert [x.tokens.tolist() for x in found] == [x.tokens.tolist() for x in alone]


# 9. Symmetry.


def test_equal_thinkers_stay_equal_unless_something_tells_them_apart(tiny):
  model, params = tiny()

  def distinct(mode, scheme, sampler=Sampler()) -> int:
    thinkers = [Thinker(header=(11,), sampler=sampler)] * 3
    group = Group(prompt=PROMPTS[0], thinkers=thinkers, sees=Sees.parse(mode))
    config = ThinkConfig(max_new_tokens=10, positions=scheme)
    (found,) = think(model, params, [group], config)
    return len({tuple(x.tokens.tolist()) for x in found})

  assert distinct('full', 'shared') == 1
  assert distinct('strict', 'shared') == 1
  assert distinct('full', 'slots') > 1
  assert distinct('interleaved', 'shared') > 1
  assert distinct('full', 'shared', WARM) == 3  # The same seed: numbers tell them apart.


# 10. Bookkeeping.


def test_columns_are_the_prompt_and_what_was_fed(tiny):
  model, params = tiny()
  groups = [trio('full'), pair('full')]
  state, fed = run_groups(
    model, params, groups, ThinkConfig(max_new_tokens=9), stop_tokens=range(30, 36)
  )
  for row, (group, own) in enumerate(split(groups, fed)):
    tokens = sum(item.step >= 0 for item in own)
    assert int(state.fill[row, -1]) == len(group.prompt) + tokens
    assert int(state.cache.columns.valid[row].sum()) == len(group.prompt) + tokens


# Exits.


@pytest.mark.parametrize('mode', ['full', 'lag:3'])
def test_a_threshold_of_one_is_full_depth(tiny, mode):
  model, params = tiny()
  groups, config = [trio(mode), pair(mode)], ThinkConfig(max_new_tokens=9)
  full = think(model, params, groups, config, stop_tokens=(7,))
  deferred = think(
    model, params, groups, config, stop_tokens=(7,), policy=decode.DeferredExit(threshold=1.0)
  )
  for ours, theirs in zip(deferred, full, strict=True):
    assert [x.tokens.tolist() for x in ours] == [x.tokens.tolist() for x in theirs]


@pytest.mark.parametrize('threshold', [0.5, 0.8])
@pytest.mark.parametrize('mode', ['full', 'interleaved', 'none'])
def test_confident_tokens_leave_early_and_nothing_is_missing_for_others(exact, mode, threshold):
  """Every token has the scores of the first exit that is confident, in one forward without a cache."""
  model, params = exact
  groups, config = [trio(mode), pair(mode)], ThinkConfig(max_new_tokens=9, slot_width=14)
  policy = decode.DeferredExit(threshold=threshold, pending_capacity=4)
  _, fed = run_groups(model, params, groups, config, policy=policy, stop_tokens=range(30, 36))
  layers = set()
  for group, own in split(groups, fed):
    wanted = expected_scores(model, params, group, mode, own, positions='slots', width=14)
    confidence = np.asarray(decode.Confidence.MAX_PROB(wanted))
    confident = confidence[:-1] > threshold
    assert np.abs(confidence[:-1] - threshold).min() > 1e-9  # No choice is a matter of rounding.
    chosen = np.where(confident.any(axis=0), confident.argmax(axis=0), len(confident))
    assert [item.exit_layer for item in own] == [model.config.depths[i] for i in chosen]
    found = np.stack([item.scores for item in own])
    expected = wanted[chosen, np.arange(len(own))]
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(wanted).max()
    layers |= {item.exit_layer for item in own}
  assert len(layers) > 1


# In pieces, and bad input.


def test_a_run_in_pieces_adds_up(tiny):
  model, params = tiny()
  groups, config = [trio('full'), pair('strict')], ThinkConfig(max_new_tokens=9)
  whole = think(model, params, groups, config, stop_tokens=(7,))
  run, events = GroupRun(model, params, groups, config, stop_tokens=(7,)), []
  while not run.done:
    events.append(run.by_group(run.advance(2)))
  assert len(events) > 3
  for g, found in enumerate(whole):
    for n, completion in enumerate(found):
      pieces = [event[g][n].tokens for event in events]
      assert np.concatenate(pieces).tolist() == completion.tokens.tolist()


@pytest.mark.parametrize(
  ('changes', 'config', 'words'),
  [
    ({'prompt': []}, {}, 'prompt of group 0 is empty'),
    ({'thinkers': []}, {}, 'has no thinkers'),
    ({'prompt': [99]}, {}, 'token 99, outside the vocabulary of 48'),
    ({'thinkers': [Thinker(header=(-1,))]}, {}, 'token -1, outside'),
    ({'thinkers': [Thinker(number=2)] * 2}, {}, r'numbered \[2, 2\]: each needs its own'),
    ({'thinkers': [Thinker(slot=-1)]}, {}, r'slots of group 0 are \[-1\]'),
    ({}, {'slot_width': 8}, 'slot_width=8 is below the 11 tokens'),
    ({}, {'max_new_tokens': 60}, '3 slots of 62 exceed the context of 128'),
    (
      {},
      {'max_new_tokens': 130, 'positions': 'shared'},
      '132 tokens per thinker exceed the context',
    ),
  ],
)
def test_bad_groups_are_named(tiny, changes, config, words):
  model, params = tiny()
  group = dataclasses.replace(trio('full'), **changes)
  with pytest.raises(UserError, match=words):
    think(model, params, [group], ThinkConfig(**{'max_new_tokens': 9, **config}))


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: Sees.parse('sideways'), "visibility='sideways' is not known: choose full, strict"),
    (lambda: Sees.parse('lag:'), 'lag:D with D steps'),
    (lambda: Sees.parse('lag:-1'), 'lag:D with D steps'),
    (lambda: ThinkConfig(max_new_tokens=0), 'must be at least 1'),
    (lambda: ThinkConfig(slot_width=0), 'must be at least 1'),
    (lambda: ThinkConfig(positions='round'), "positions='round'"),
  ],
)
def test_bad_settings_are_named(make, words):
  with pytest.raises(UserError, match=words):
    make()


@pytest.mark.parametrize('policy', [decode.RecomputeExit(threshold=0.5), decode.Speculative()])
def test_other_policies_are_refused(tiny, policy):
  with pytest.raises(UserError, match='groups think with strategy full or deferred'):
    think(*tiny(), [trio('full')], policy=policy)
