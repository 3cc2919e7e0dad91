"""Running groups: to the end, or step by step with texts that come and go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from exitax.decode.cache import CacheFormat
from exitax.decode.generate import PREFILL_CHUNK, make_requests
from exitax.decode.groups import (
  Group,
  Spare,
  ThinkConfig,
  Thinker,
  begin_groups,
  budget_of,
  last_position,
  numbers_of,
  policy_for,
  slot_width_of,
)
from exitax.decode.joining import NewText, give_tokens, start_text, stop_texts
from exitax.decode.lanes import InGroups
from exitax.decode.loop import run_steps
from exitax.decode.policies import ExitPolicy, FullDepth
from exitax.decode.results import Completion, completions_since
from exitax.decode.texts import Positions
from exitax.errors import UserError
from exitax.models import ExitLM, Params

_TO_THE_END = np.iinfo(np.int32).max


def think(
  model: ExitLM,
  params: Params,
  groups: Sequence[Group],
  config: ThinkConfig = ThinkConfig(),
  *,
  policy: ExitPolicy = FullDepth(),
  stop_tokens: Sequence[int] = (),
  prefill_chunk: int = PREFILL_CHUNK,
  cache_format: CacheFormat = CacheFormat.COMPUTE,
) -> list[tuple[Completion, ...]]:
  """Lets every group think to the end; what each of its thinkers wrote, header apart.

  Args:
    model: the model.
    params: its parameters, stacked or prepared.
    groups: at least one.
    config: budgets and positions.
    policy: `FullDepth` or `DeferredExit`: where tokens may leave the stack of layers.
    stop_tokens: ids that end a text; the id is part of it, and the others see it.
    prefill_chunk: prompt tokens per group that are run at once.
    cache_format: how keys and values are kept.

  Raises:
    UserError: an empty prompt or group, tokens outside the vocabulary, slots that are too narrow or
      exceed the context, another policy.
  """
  run = GroupRun(
    model,
    params,
    groups,
    config,
    policy=policy,
    stop_tokens=stop_tokens,
    prefill_chunk=prefill_chunk,
    cache_format=cache_format,
  )
  return run.finish()


class GroupRun:
  """Groups that think, in the hands of somebody who may start, stop and address their texts.

  Texts are numbered in the order of groups and their thinkers; spare ones come last.
  """

  def __init__(
    self,
    model: ExitLM,
    params: Params,
    groups: Sequence[Group],
    config: ThinkConfig = ThinkConfig(),
    *,
    policy: ExitPolicy = FullDepth(),
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
    cache_format: CacheFormat = CacheFormat.COMPUTE,
    spare: Spare = Spare(),
  ) -> None:
    """Caches the prompts. Arguments and errors as `think`; `spare` is room for texts to come."""
    self._policy = policy_for(policy, groups, lanes=spare.more_lanes)
    self._model, self._groups, self._config = model, tuple(groups), config
    self._stop_tokens, self._spare = tuple(stop_tokens), spare
    plan = self._policy.plan(model.config)
    self._params = plan.placement.prepare_params(model, params)
    self.state = begin_groups(
      model,
      self._params,
      groups,
      config,
      policy=self._policy,
      stop_tokens=stop_tokens,
      prefill_chunk=prefill_chunk,
      cache_format=cache_format,
      spare=spare,
    )
    rotated = 0
    if config.positions is Positions.ROTATED:
      rotated = 1 + max(number for group in groups for number in numbers_of(group)) + spare.texts
    self._plan, self._visibility = plan, InGroups(model.config.sliding_window, rotated)
    self._seen = np.zeros(self.state.step.shape, np.int32)
    # Tokens that each group's late texts, and what was given, have taken of the spare ones.
    self._spent = [0] * len(groups)

  @property
  def done(self) -> bool:
    """Whether every text has ended."""
    return bool(np.all(self.state.done))

  def advance(self, num_steps: int) -> tuple[Completion, ...]:
    """Steps until every text has ended, `num_steps` at most; what each text has gained."""
    self._run(num_steps)
    gained = completions_since(self.state, self._seen)
    self._seen = np.array(self.state.step)
    return gained

  def finish(self) -> list[tuple[Completion, ...]]:
    """Steps until every text has ended; what each thinker of each group has gained."""
    return self.by_group(self.advance(_TO_THE_END))

  def by_group(self, completions: Sequence[Completion]) -> list[tuple[Completion, ...]]:
    """Of each text to of each thinker of each group; spare texts are left out."""
    ends = np.cumsum([0, *(len(group.thinkers) for group in self._groups)])
    return [tuple(completions[a:b]) for a, b in itertools.pairwise(ends)]

  def start(self, text: int, group: int, thinker: Thinker, *, sees_all: bool = False) -> None:
    """Begins a text in place of one that has ended, or of a spare one.

    Where all have ended, their last tokens are fed first: they know nothing of what comes.

    Args:
      text: its place.
      group: whose.
      thinker: with a header, a number and, for positions by slot, a slot that are its own.
      sees_all: sees everything that the group has thought, whatever the group's visibility.

    Raises:
      UserError: a text that has not ended, no header, or more tokens than there is room for.
    """
    config, own = self._model.config, self._groups[group]
    assert self.state.group is not None, 'a run has groups'
    if not self.state.done[text]:
      raise UserError(f'text {text} has not ended: stop it first')
    if not len(thinker.header) or thinker.number is None or thinker.slot is None:
      raise UserError('a text that begins later needs a header, a number and a slot')
    highest = self._visibility.rotated - 1
    if self._visibility.rotated and thinker.number > highest:
      raise UserError(f'number={thinker.number} is above {highest}, the last that has room')
    budget = budget_of(thinker, self._config)
    needed, width = len(thinker.header) + budget, slot_width_of(own, self._config)
    last = last_position(own, self._config, thinker, later=self._spent[group])
    if last > config.max_length:
      raise UserError(
        f'{needed} tokens of a new text end at position {last}, beyond the context of '
        f'{config.max_length}'
      )
    self._spend(group, needed)
    if self.done and np.any(self.state.group.fed < self.state.length):
      self._run(1, at_least=1)
    header = np.zeros((self._spare.tokens,), np.int32)
    header[: len(thinker.header)] = thinker.header
    requests = make_requests(
      config,
      policy=self._policy,
      samplers=[thinker.sampler],
      stop_tokens=self._stop_tokens,
      seeds=[thinker.seed],
      budgets=[budget],
    )
    new = NewText(
      row=group,
      header=jnp.asarray(header),
      header_length=len(thinker.header),
      number=thinker.number,
      slot=thinker.slot,
      slot_width=width,
      rank=thinker.number if thinker.rank is None else thinker.rank,
      lag=own.sees.lag,
      by_rank=own.sees.by_rank,
      sees_all=sees_all,
      requests=jax.tree.map(jnp.asarray, requests),
    )
    self.state = start_text(self.state, text, new)
    self._seen[text] = 0

  def stop(self, texts: Sequence[int]) -> None:
    """Ends texts where they are; the others see what they wrote."""
    marked = np.zeros(self.state.done.shape, bool)
    marked[list(texts)] = True
    self.state = stop_texts(self.state, jnp.asarray(marked))

  def give(self, text: int, tokens: Sequence[int]) -> None:
    """Puts tokens into a running text, which goes on behind them; they are among its next gains.

    Raises:
      UserError: more than there is room for among the spare tokens, in its slot, or in the context.
    """
    grouping = self.state.group
    assert grouping is not None, 'a run has groups'
    group = int(grouping.row[text])
    own = self._groups[group]
    length = int(self.state.requests.budget[text] + self.state.prompt_length[text])
    length += len(tokens) - len(own.prompt)
    if self._config.positions is Positions.SLOTS:
      width = int(grouping.slot_width[text])
      if length > width:
        raise UserError(f'{len(tokens)} more tokens make {length} in a slot of {width}: widen it')
    elif len(own.prompt) + length + self._spent[group] > self._model.config.max_length:
      raise UserError(
        f'{len(tokens)} more tokens exceed the context of {self._model.config.max_length}'
      )
    self._spend(group, len(tokens))
    given = np.zeros((self._spare.tokens,), np.int32)
    given[: len(tokens)] = tokens
    self.state = give_tokens(self.state, text, jnp.asarray(given), len(tokens))

  def _run(self, num_steps: int, *, at_least: int = 0) -> None:
    self.state = run_steps(
      self._model,
      self._params,
      self.state,
      num_steps,
      plan=self._plan,
      visibility=self._visibility,
      at_least=at_least,
    )

  def _spend(self, group: int, count: int) -> None:
    """Takes room for tokens that nobody knew of when the cache was made."""
    left = self._spare.tokens - self._spent[group]
    if count > left:
      raise UserError(f'{count} tokens exceed the room for {left} that group {group} has left')
    self._spent[group] += count
