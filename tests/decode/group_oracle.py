"""Groups step by step, and the uncached oracle: one masked forward over everything that was fed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from exitax import decode
from exitax.decode import Group, GroupRun, ThinkConfig
from exitax.decode.texts import next_feed
from exitax.layers import dot_product_attention


@dataclasses.dataclass(frozen=True)
class Fed:
  """A token that a thinker fed, and the scores of its next one.

  Attributes:
    text: index of the text.
    step: how many tokens the thinker had fed before; -1 for the prompt's last.
    token: its id.
    scores: `[vocab]`.
    exit_layer: layers run before them.
  """

  text: int
  step: int
  token: int
  scores: np.ndarray
  exit_layer: int


@functools.partial(jax.jit, static_argnames=('model', 'plan', 'visibility'))
def _one_step(model, params, state, plan, visibility):
  feed = next_feed(state)
  step = state.group.fed - state.group.shared
  state, gain = plan.advance(model, params, state, visibility=visibility)
  fed = feed.tokens, feed.active, step, gain.scores[:, 0], gain.exit_layer[:, 0]
  return decode.commit(state, gain), fed


def run_groups(
  model,
  params,
  groups: Sequence[Group],
  config: ThinkConfig,
  *,
  poison: float | None = None,
  **settings,
):
  """The state at the end, and every token that was fed, in the order of the steps."""
  run = GroupRun(model, params, groups, config, **settings)
  if poison is not None:
    state = run.state
    valid = state.cache.columns.valid[:, None, :, None]
    layers = jax.tree.map(lambda x: jnp.where(valid, x, poison), state.cache.layers)
    run.state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))
  fed = record(run)
  return run.state, fed


def record(run: GroupRun, num_steps: int = 1000) -> list[Fed]:
  """Advances a run to its end, `num_steps` at most; what was fed."""
  fed = []
  for _ in range(num_steps):
    if run.done:
      break
    run.state, (tokens, active, step, scores, layers) = _one_step(
      run._model, run._params, run.state, run._plan, run._visibility
    )
    fed += [
      Fed(text, int(step[text]), int(tokens[text]), np.asarray(scores[text]), int(layers[text]))
      for text in np.flatnonzero(active)
    ]
  return fed


def sees(mode: str, *, other: tuple[int, int], query: tuple[int, int]) -> bool:
  """Whether a query (step, rank) sees another thinker's token (step, rank)."""
  match mode.partition(':'):
    case ('full', _, _):
      return other[0] <= query[0]
    case ('interleaved', _, _):
      return other < query
    case ('strict', _, _):
      return other[0] < query[0]
    case ('lag', _, number):
      return other[0] <= query[0] - int(number)
    case ('none', _, _):
      return False
  raise AssertionError(mode)


def expected_scores(
  model,
  params,
  group: Group,
  mode: str,
  fed: Sequence[Fed],
  *,
  positions: str,
  width: int,
  starts: dict[int, int] | None = None,
  sees_all: Sequence[int] = (),
) -> np.ndarray:
  """`[exits + 1, len(fed), vocab]`: what one forward over the prompt and all of `fed` says of each of them.

  Args:
    model: the model.
    params: stacked parameters.
    group: prompt and thinkers; `Fed.text` is a thinker's place here.
    mode: what thinkers see, as in `Sees.parse`.
    fed: the group's tokens, each thinker's in order.
    positions: 'slots' or 'shared'.
    width: of a slot.
    starts: step of the row at which a text began, for those that came later.
    sees_all: texts that see everything.
  """
  starts = starts or {}
  prompt = list(group.prompt)
  own = [item for item in fed if item.step >= 0]
  tokens = [*prompt, *(item.token for item in own)]
  thinkers = group.thinkers
  places = [
    len(prompt)
    + item.step
    + (
      _or(thinkers[item.text].slot, item.text) * width
      if positions == 'slots'
      else starts.get(item.text, 0)
    )
    for item in own
  ]
  mask = np.zeros((len(tokens), len(tokens)), bool)
  mask[: len(prompt), : len(prompt)] = np.tri(len(prompt), dtype=bool)
  for i, query in enumerate(own):
    mask[len(prompt) + i, : len(prompt)] = True
    for j, key in enumerate(own):
      steps = [x.step + starts.get(x.text, 0) for x in (key, query)]
      ranks = [_or(thinkers[x.text].rank, x.text) for x in (key, query)]
      mask[len(prompt) + i, len(prompt) + j] = (
        key.step <= query.step
        if key.text == query.text
        else query.text in sees_all
        or sees(mode, other=(steps[0], ranks[0]), query=(steps[1], ranks[1]))
      )
  scores = masked_forward(model, params, tokens, [*range(len(prompt)), *places], mask)
  at = {(item.text, item.step): len(prompt) + i for i, item in enumerate(own)}
  return scores[:, [at.get((item.text, item.step), len(prompt) - 1) for item in fed]]


def masked_forward(model, params, tokens, positions, mask) -> np.ndarray:
  """Scores `[exits + 1, length, vocab]` of one forward without a cache, under any mask and positions."""
  # One compiled shape for all lengths: padding sees itself alone.
  size = -(-len(tokens) // 32) * 32
  padded = np.eye(size, dtype=bool)
  padded[: len(tokens), : len(tokens)] = mask
  scores = _masked_forward(
    model,
    params,
    np.pad(tokens, (0, size - len(tokens)))[None],
    np.pad(positions, (0, size - len(tokens)))[None],
    padded[None],
  )
  return np.asarray(scores[:, 0, : len(tokens)])


@functools.partial(jax.jit, static_argnames='model')
def _masked_forward(model, params, tokens, positions, mask):
  def attend(query, key, value):
    return dot_product_attention(query, key, value, mask), None

  hidden = model.hidden_at_exits(
    params, model.embed(params, tokens), rotary=model.rotary(positions), attend=attend
  )
  scores = []
  for exit_config, stream in zip((*model.config.exits, None), hidden, strict=True):
    features, _ = model.exit_features(params, exit_config, stream, rotary=None, attend=None)
    scores.append(model.logits(params, exit_config, features))
  return jnp.stack(scores)


def _or(value, default):
  return default if value is None else value
