"""Single texts among groups: taken out and put back, they are what they were, and so are the groups."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest

from exitax import decode
from exitax.decode import Causal, InGroups
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


@pytest.mark.parametrize(('threshold', 'seed'), [(0.5, 0), (0.5, 1), (1.0, 2)])
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


def test_speculation_beside_groups_touches_nobody_else(tiny):
  """Drafts are given up by row: rows that stayed keep every column, whatever text stands for them meanwhile."""
  model, params = tiny(HeadKind.NORM)
  params = decode.prepare_params(model, params)
  full = decode.DeferredExit(threshold=1.0, pending_capacity=4).plan(model.config)
  policy = decode.Speculative(exit_layer=2, num_drafts=3, pending_capacity=4)
  groups, state = begin(model, params, policy)
  state = decode.run_steps(model, params, state, 5, visibility=InGroups(), plan=full)
  before = jax.device_get(state)
  while not state.done[0]:
    state = decode.run_singles(
      model,
      params,
      state,
      2,
      visibility=Causal(),
      texts=np.arange(4) == 0,
      plan=policy.plan(model.config),
    )
  after = jax.device_get(state)
  for name in ('tokens', 'step', 'done', 'requests', 'group'):
    old, new = getattr(before, name), getattr(after, name)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1:], y[1:]), old, new)
  for name in ('cache', 'fill', 'pending'):  # The first row is the text's.
    old, new = getattr(before, name), getattr(after, name)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1:], y[1:]), old, new)
  state = decode.run_steps(model, params, state, 100, visibility=InGroups(), plan=full)
  together = decode.think(model, params, groups, CONFIG, policy=decode.DeferredExit(threshold=1.0))
  for text, completion in enumerate(item for group in together for item in group):
    start = int(state.prompt_length[text])
    written = state.tokens[text, start : start + int(state.step[text])]
    np.testing.assert_array_equal(written, completion.tokens)
