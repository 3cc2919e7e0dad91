"""Group Think (arXiv 2505.11107): thinkers that write at once and see each other's tokens as they appear.

A group is one prompt and its thinkers; groups of any size, single requests (groups of one) among them,
share a state and its steps. The loop is that of `generate`: a group is a row of the cache, its
thinkers are lanes, and who sees whom is data (`lanes.Origin`).

Worked miniature, `full`, prompt p0 p1, two thinkers with headers a0 and b0:

  step   fed (column)        a sees then        chosen
  -1     p1 (1, once)        p0 p1              a0, b0 are given
   0     a0 (2), b0 (3)      p0 p1 a0 b0        a1, b1
   1     a1 (4), b1 (5)      p0 p1 a0..a1 b0..b1  a2, b2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from exitax.decode.cache import CacheFormat
from exitax.decode.generate import (
  CAPACITY_STEP,
  PREFILL_CHUNK,
  make_requests,
  prefill_chunks,
  round_up,
)
from exitax.decode.lanes import Causal
from exitax.decode.policies import DeferredExit, ExitPolicy, FullDepth
from exitax.decode.sampler import Sampler
from exitax.decode.state import DecodeState, init_state
from exitax.decode.texts import Grouping, Positions
from exitax.errors import UserError, choose
from exitax.layers import attention_temperature
from exitax.models import ExitLM, ModelConfig, Params

NEVER = 1 << 30  # A lag longer than any text.


@dataclasses.dataclass(frozen=True)
class Sees:
  """Which tokens of the others a thinker sees.

  Attributes:
    lag: those at least so many steps old; 0 sees the tokens of the same step.
    by_rank: of the same step those of lower rank, all earlier ones; `lag` is not read.
  """

  lag: int = 0
  by_rank: bool = False

  @classmethod
  def parse(cls, text: str) -> Sees:
    """From 'full', 'interleaved', 'strict', 'lag:D' or 'none'.

    Raises:
      UserError: anything else.
    """
    named = {'full': cls(0), 'strict': cls(1), 'none': cls(NEVER), 'interleaved': cls(0, True)}
    if text in named:
      return named[text]
    word, _, number = text.partition(':')
    if word == 'lag' and number.isdecimal():
      return cls(min(int(number), NEVER))
    raise UserError(
      f'visibility={text!r} is not known: choose {", ".join(named)}, or lag:D with D steps, such as lag:4'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinker:
  """One of a group.

  Attributes:
    header: token ids that its text begins with; given, not chosen.
    sampler: how it chooses tokens.
    seed: with its number and its own count of tokens, all that its random numbers depend on.
    max_new_tokens: tokens after the header at most; None takes the group's.
    number: unique in the group; None is its place in the list.
    slot: its block of positions; None is its place in the list.
    rank: its order within a step, for `interleaved`; None is its place in the list.
  """

  header: Sequence[int] = ()
  sampler: Sampler = Sampler()
  seed: int = 0
  max_new_tokens: int | None = None
  number: int | None = None
  slot: int | None = None
  rank: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """A prompt and who thinks about it.

  Attributes:
    prompt: token ids, at least one.
    thinkers: at least one.
    sees: what each sees of the others.
  """

  prompt: Sequence[int]
  thinkers: Sequence[Thinker]
  sees: Sees = Sees()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spare:
  """Room for texts that begin later.

  Attributes:
    texts: how many, in all groups together.
    tokens: of them in one group, headers included.
    lanes: how many of them feed tokens in a step with all thinkers of a group. (One that comes when
      the others have ended meets their last tokens.)
  """

  texts: int = 0
  tokens: int = 0
  lanes: int = 1

  @property
  def more_lanes(self) -> int:
    """Lanes of a row beyond those of its thinkers."""
    return min(self.lanes, self.texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkConfig:
  """What groups of one state share.

  Attributes:
    max_new_tokens: tokens per thinker at most, header apart.
    positions: the scheme.
    slot_width: positions of each thinker. With a fixed width a short run is the beginning of a
      longer one; None takes the longest text, as the paper packs them.
  """

  max_new_tokens: int = 64
  positions: Positions = Positions.SLOTS
  slot_width: int | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, 'positions', choose(Positions, self.positions, name='positions'))
    if self.max_new_tokens < 1:
      raise UserError(f'max_new_tokens={self.max_new_tokens} must be at least 1')
    if self.slot_width is not None and self.slot_width < 1:
      raise UserError(f'slot_width={self.slot_width} must be at least 1')


def begin_groups(
  model: ExitLM,
  params: Params,
  groups: Sequence[Group],
  config: ThinkConfig,
  *,
  policy: ExitPolicy,
  stop_tokens: Sequence[int] = (),
  prefill_chunk: int = PREFILL_CHUNK,
  cache_format: CacheFormat = CacheFormat.COMPUTE,
  spare: Spare = Spare(),
) -> DecodeState:
  """A state whose prompts are cached, once per group, ready for `run_steps` with `InGroups`.

  Texts are in the order of groups and their thinkers, spare ones last. Arguments as `think`, with
  parameters after `prepare_params` and a policy after `policy_for`.
  """
  _check(model.config, groups, config)
  plan = policy.plan(model.config)
  nobody = Thinker(max_new_tokens=1)
  thinkers = [thinker for group in groups for thinker in group.thinkers] + [nobody] * spare.texts
  budgets = [budget_of(thinker, config) for thinker in thinkers]
  lengths = [len(group.prompt) for group in groups]
  chunk, num_chunks = prefill_chunks(max(lengths), prefill_chunk)
  grouping = _grouping(groups, config, spare)
  fed = [
    len(group.prompt) + sum(len(x.header) + budget_of(x, config) for x in group.thinkers)
    for group in groups
  ]
  # Windows of lanes, padding included, must fit behind the last token.
  columns = max(max(fed) + spare.tokens + grouping.max_lanes + plan.overhang, num_chunks * chunk)
  texts = [[*group.prompt, *thinker.header] for group in groups for thinker in group.thinkers]
  texts += [[]] * spare.texts
  width = max(len(text) + budget for text, budget in zip(texts, budgets, strict=True))
  width = max(width, max(lengths) + spare.tokens)
  tokens = np.zeros((len(texts), max(round_up(width, CAPACITY_STEP), num_chunks * chunk)), np.int32)
  for index, text in enumerate(texts):
    tokens[index, : len(text)] = text
  state = init_state(
    model.config,
    plan,
    tokens=tokens,
    prompt_length=np.asarray([len(text) for text in texts], np.int32),
    requests=make_requests(
      model.config,
      policy=policy,
      samplers=[thinker.sampler for thinker in thinkers],
      stop_tokens=stop_tokens,
      seeds=[thinker.seed for thinker in thinkers],
      budgets=budgets,
    ),
    cache_format=cache_format,
    group=grouping,
    cache_shape=(len(groups), round_up(columns, CAPACITY_STEP)),
  )
  return plan.placement.prefill(
    model,
    params,
    state,
    num_chunks=num_chunks,
    chunk=chunk,
    visibility=Causal(model.config.sliding_window),
  )


def policy_for(policy: ExitPolicy, groups: Sequence[Group], *, lanes: int = 0) -> ExitPolicy:
  """The policy with room for the tokens that the largest group, and `lanes` more, feed in a step.

  Raises:
    UserError: a policy that groups do not take.
  """
  if isinstance(policy, FullDepth):
    return policy
  if isinstance(policy, DeferredExit):
    most = max((len(group.thinkers) for group in groups), default=1) + lanes
    return dataclasses.replace(policy, pending_capacity=max(policy.pending_capacity, most))
  raise UserError(
    f'groups think with strategy full or deferred, not {type(policy).__name__}: choose one of them'
  )


def _grouping(groups: Sequence[Group], config: ThinkConfig, spare: Spare) -> Grouping:
  """Arrays of all texts, before the first step."""
  rows: list[dict[str, int]] = []
  for row, group in enumerate(groups):
    width = slot_width_of(group, config)
    for place, thinker in enumerate(group.thinkers):
      rows.append(
        {
          'row': row,
          'thinker': _or(thinker.number, place),
          'slot': _or(thinker.slot, place),
          'rank': _or(thinker.rank, place),
          'lag': group.sees.lag,
          'by_rank': group.sees.by_rank,
          'sees_all': False,
          'start': 0,
          'shared': len(group.prompt),
          'fed': len(group.prompt) - 1,
          'slot_width': width,
        }
      )
  rows += [dict.fromkeys(rows[0], 0)] * spare.texts
  flags = ('by_rank', 'sees_all')
  columns = {
    name: jnp.asarray([row[name] for row in rows], bool if name in flags else jnp.int32)
    for name in rows[0]
  }
  return Grouping(
    **columns,
    positions=config.positions,
    max_lanes=max(len(group.thinkers) for group in groups) + spare.more_lanes,
  )


def _check(model: ModelConfig, groups: Sequence[Group], config: ThinkConfig) -> None:
  if not groups:
    raise UserError('no groups: give at least one')
  for index, group in enumerate(groups):
    where = f'group {index}'
    if not len(group.prompt):
      raise UserError(f'the prompt of {where} is empty: give at least one token')
    if not group.thinkers:
      raise UserError(f'{where} has no thinkers: give at least one')
    ids = [*group.prompt, *(token for item in group.thinkers for token in item.header)]
    if min(ids) < 0 or max(ids) >= model.vocab_size:
      wrong = min(ids) if min(ids) < 0 else max(ids)
      raise UserError(f'{where} has token {wrong}, outside the vocabulary of {model.vocab_size}')
    numbers = numbers_of(group)
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
      raise UserError(f'thinkers of {where} are numbered {numbers}: each needs its own, 0 or more')
    _check_positions(model, group, config, where)


def _check_positions(model: ModelConfig, group: Group, config: ThinkConfig, where: str) -> None:
  longest = _longest(group, config)
  if config.positions is Positions.SLOTS:
    width = slot_width_of(group, config)
    if width < longest:
      raise UserError(
        f'slot_width={width} is below the {longest} tokens that a thinker of {where} may have: widen it'
      )
    slots = [_or(item.slot, place) for place, item in enumerate(group.thinkers)]
    if min(slots) < 0:
      raise UserError(f'slots of {where} are {slots}: they must be 0 or more')
    needed = len(group.prompt) + max(slots) * width + longest
    what = f'{max(slots) + 1} slots of {width}'
  elif config.positions is Positions.SHARED:
    needed, what = len(group.prompt) + longest, f'{longest} tokens per thinker'
  else:
    if attention_temperature(model.rope) != 1.0:
      raise UserError(
        "positions=rotated turns queries twice, which changes YaRN's factor on scores: choose slots or shared"
      )
    total = sum(len(item.header) + budget_of(item, config) for item in group.thinkers)
    needed, what = len(group.prompt) + total, f'{total} tokens of all thinkers'
  if needed > model.max_length:
    raise UserError(
      f'a prompt of {len(group.prompt)} tokens and {what} exceed the context of {model.max_length}: ask '
      'for fewer tokens or thinkers'
    )


def _longest(group: Group, config: ThinkConfig) -> int:
  return max(len(item.header) + budget_of(item, config) for item in group.thinkers)


def numbers_of(group: Group) -> list[int]:
  """Of the group's thinkers."""
  return [_or(item.number, place) for place, item in enumerate(group.thinkers)]


def last_position(group: Group, config: ThinkConfig, thinker: Thinker, *, later: int = 0) -> int:
  """One more than the highest position that a thinker which begins in mid-stream can have.

  Args:
    group: whose.
    config: budgets and positions.
    thinker: who begins.
    later: tokens of those who began in mid-stream before.
  """
  length = len(group.prompt)
  own = len(thinker.header) + budget_of(thinker, config)
  if config.positions is Positions.SLOTS:
    return length + _or(thinker.slot, 0) * slot_width_of(group, config) + own
  if config.positions is Positions.SHARED:
    return length + _longest(group, config) + later + own
  total = sum(len(x.header) + budget_of(x, config) for x in group.thinkers)
  return length + total + later + own


def slot_width_of(group: Group, config: ThinkConfig) -> int:
  """Positions of a slot of the group."""
  return config.slot_width or _longest(group, config)


def budget_of(thinker: Thinker, config: ThinkConfig) -> int:
  """Tokens that a thinker may choose at most."""
  return _or(thinker.max_new_tokens, config.max_new_tokens)


def _or(value: int | None, default: int) -> int:
  return default if value is None else value
