"""Single texts among groups: taken out and put back, they are what they were, and so are the groups."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest

from exitax import decode
from exitax.decode import Causal, InGroups
from exitax.decode.singles import put_back_singles, take_singles
from exitax.layers import HeadKind

PROMPTS = ((5, 6, 7, 8), (9, 10), (11,))
CONFIG = decode.ThinkConfig(max_new_tokens=24)


def begin(model, params, policy):
  """A single text, a group of two, and another single."""
  sizes = (1, 2, 1)
  groups = [
    decode.Group(
      prompt=prompt,
      thinkers=[decode.Thinker(sampler=decode.Sampler(temperature=0.8), seed=3)] * size,
    )
    for prompt, size in zip(PROMPTS, sizes, strict=True)
  ]
  return groups, decode.begin_groups(model, params, groups, CONFIG, policy=policy)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('threshold', [0.5, 1.0])
def test_steps_alone_and_among_groups_take_turns(tiny, threshold: float, seed: int):
  model, params = tiny(HeadKind.NORM)
  params = decode.prepare_params(model, params)
  policy = decode.DeferredExit(threshold=threshold)
  groups, state = begin(model, params, policy)
  common = {'plan': policy.plan(model.config)}
  rng = random.Random(seed)
  while not np.all(state.done):
    if rng.random() < 0.5:
      state = decode.run_steps(
        model, params, state, rng.randrange(1, 4), visibility=InGroups(), **common
      )
    else:
      texts = np.asarray([rng.random() < 0.7, False, False, rng.random() < 0.7])
      state = decode.run_singles(
        model, params, state, rng.randrange(1, 4), visibility=Causal(), texts=texts, **common
      )
  together = decode.think(model, params, groups, CONFIG, policy=policy)
  expected = [completion.tokens for group in together for completion in group]
  for text, tokens in enumerate(expected):
    start = int(state.prompt_length[text])
    np.testing.assert_array_equal(state.tokens[text, start : start + int(state.step[text])], tokens)


def test_what_is_not_taken_out_stays_bit_by_bit(tiny):
  model, params = tiny(HeadKind.NORM)
  params = decode.prepare_params(model, params)
  policy = decode.Speculative(exit_layer=1, num_drafts=3, pending_capacity=4)
  groups, state = begin(model, params, decode.DeferredExit(threshold=1.0, pending_capacity=4))
  del groups
  rows, singles = take_singles(state, np.asarray([False, False, False, False]))
  assert np.all(rows.done)
  back = put_back_singles(state, rows, singles)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  assert policy.plan(model.config).overhang
