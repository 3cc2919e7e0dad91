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
from exitax.layers import dot_product_attention, rotate


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


def record(run: GroupRun, num_steps: int = 1000, *, at_least: int = 0) -> list[Fed]:
  """Advances a run to its end, `num_steps` at most and `at_least` beyond it; what was fed."""
  fed = []
  for number in range(num_steps):
    if run.done and number >= at_least:
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


def expected_in_views(model, params, group: Group, mode: str, fed: Sequence[Fed]) -> np.ndarray:
  """As `expected_scores` at the final layer, for rotated positions.

  Every token reads the prompt, the other thinkers' texts in their order and its own text, of each what it
  sees, side by side: queries and keys of each pair are turned by their places in that order.
  """
  prompt, own = list(group.prompt), [item for item in fed if item.step >= 0]
  length, size = len(prompt), len(prompt) + len(own)
  place = np.zeros((size, size), int)
  mask = np.zeros((size, size), bool)
  mask[:length, :length] = np.tri(length, dtype=bool)
  place[:, :length] = np.arange(length)
  for i, query in enumerate(own):
    mask[length + i, :length] = True
    after = length
    others = [text for text in range(len(group.thinkers)) if text != query.text]
    for text in [*others, query.text]:
      for j, key in enumerate(own):
        visible = key.text == text and (
          key.step <= query.step
          if text == query.text
          else sees(mode, other=(key.step, key.text), query=(query.step, query.text))
        )
        if visible:
          mask[length + i, length + j] = True
          place[length + i, length + j] = after + key.step
      after += sum(mask[length + i, length + j] for j, key in enumerate(own) if key.text == text)
  tokens = [*prompt, *(item.token for item in own)]
  scores = np.asarray(_view_forward(model, params, np.asarray([tokens]), place, mask))[0]
  at = {(item.text, item.step): length + i for i, item in enumerate(own)}
  return scores[[at.get((item.text, item.step), length - 1) for item in fed]]


def _view_forward(model, params, tokens, place, mask):
  """One forward in which query i and key j are turned by `place[i, i]` and `place[i, j]`."""
  still = model.rotary(jnp.zeros(tokens.shape, jnp.int32))
  query_turn = model.rotary(jnp.asarray(np.diagonal(place))[None])
  key_turn = model.rotary(jnp.asarray(place))

  def attend(query, key, value):
    query = rotate(query, query_turn)[0]
    keys = rotate(jnp.broadcast_to(key, (len(place), *key.shape[1:])), key_turn)
    repeats = query.shape[1] // keys.shape[2]
    logits = jnp.einsum('ihd,ijhd->hij', query, jnp.repeat(keys, repeats, axis=2))
    logits = jnp.where(mask, logits * query.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    mixed = jnp.einsum('hij,jhd->ihd', weights, jnp.repeat(value[0], repeats, axis=1))
    return mixed[None], None

  hidden = model.hidden_at_exits(params, model.embed(params, tokens), rotary=still, attend=attend)
  features, _ = model.exit_features(params, None, hidden[-1], rotary=None, attend=None)
  return model.logits(params, None, features)


def _or(value, default):
  return default if value is None else value
