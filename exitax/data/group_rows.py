"""Training rows of groups: problems, and what thinkers wrote about them.

The tokens of a problem are its prompt and then, step after step, one token of every thinker who has one: the
order in which a cache is filled. The target of a token is the next one of the same thinker; headers, which
are given, and the prompt have none. Each problem draws how many thinkers there are, their names and slots, and
what they see of each other, so that one model learns all of it. A row is filled with one problem after another
(a segment each, as documents are packed); of the last one the steps that do not fit are left out.

Miniature, two thinkers with headers `|a` and `|b`, texts `xy` and `z`, `$` the end, slots of 5 after a prompt of 2:

  tokens     p p | | a b x z y $ $
  owner      - - 0 1 0 1 0 1 0 1 0
  step       - - 0 0 1 1 2 2 3 3 4
  positions  0 1 2 7 3 8 4 9 5 0 6      (0 for 10)
  targets    . . . . x z y $ $ . .
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence

import numpy as np

from exitax.data.batch import Batch, Origins, empty_row
from exitax.data.group_tasks import Seen, Task, Teacher, simulate
from exitax.data.tokenizers import Tokenizer, encode_prompt
from exitax.errors import UserError

NAMES = string.ascii_uppercase
NEVER = 1 << 30
_PROMPT = -1
# (token, target or None, owner, step, position) of a token.
_Place = tuple[int, int | None, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupMix:
  """What problems draw from, evenly.

  Attributes:
    thinkers: numbers of thinkers.
    lags: of what thinkers see of each other; -1 is never: independent texts.
    slots: different slots that thinkers may have; at least as many as there are thinkers.
    slot_width: positions of a slot; a thinker's header and text must fit.
    teacher: who writes the texts.
  """

  thinkers: tuple[int, ...] = (1, 2, 4, 8)
  lags: tuple[int, ...] = (0,)
  slots: int = 8
  slot_width: int = 64
  teacher: Teacher = Teacher(slip=0.05, stall=0.02)

  def __post_init__(self) -> None:
    for name in ('thinkers', 'lags'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if not self.thinkers or min(self.thinkers) < 1 or max(self.thinkers) > len(NAMES):
      raise UserError(f'thinkers={self.thinkers} must be numbers from 1 to {len(NAMES)}')
    if not self.lags or min(self.lags) < -1:
      raise UserError(f'lags={self.lags} must be 0 or more, or -1 for never')
    if self.slots < max(self.thinkers):
      raise UserError(f'slots={self.slots} are fewer than the {max(self.thinkers)} thinkers')


def header_text(name: str) -> str:
  """What a thinker's text begins with."""
  return f'|{name}'


def char_ids(tokenizer: Tokenizer, text: str) -> list[int]:
  """A token per character, however the tokenizer would join them: thinkers see texts grow by characters."""
  return [token for char in text for token in tokenizer.encode(char)]


class GroupRows(Sequence[Batch]):
  """As many rows as you like: row i is a function of seed and i, and of nothing else."""

  def __init__(
    self,
    task: Task,
    mix: GroupMix,
    *,
    tokenizer: Tokenizer,
    length: int,
    seed: int,
    count: int = 1 << 24,
  ) -> None:
    """Takes what rows are made of.

    Args:
      task: where problems come from.
      mix: how they are thought about.
      tokenizer: of the model; a text's characters become tokens one by one.
      length: tokens of a row.
      seed: two numbers give rows that have nothing in common.
      count: how many.
    """
    self.length, self.pad_id, self._count = length, tokenizer.pad_id, count
    self._task, self._mix, self._tokenizer, self._seed = task, mix, tokenizer, seed

  def __len__(self) -> int:
    """As many as asked for."""
    return self._count

  @property
  def padding(self) -> Batch:
    """A row `[length]` that holds nothing."""
    return self._arrays([])

  def last_position(self, samples: int = 64) -> int:
    """One more than the highest position, as far as the prompts of some problems tell."""
    prompts = (
      self._task.problem(np.random.default_rng([self._seed, i])).prompt for i in range(samples)
    )
    longest = max(len(encode_prompt(self._tokenizer, prompt)) for prompt in prompts)
    return longest + self._mix.slots * self._mix.slot_width

  def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
    """Row `index`, arrays `[length]`."""
    if not 0 <= index < self._count:
      raise IndexError(index)
    rng = np.random.default_rng([self._seed, index])
    groups: list[tuple[list[_Place], int]] = []
    left = self.length
    while left > 0:
      places, lag = self._group(rng, left)
      if not places:
        break
      groups.append((places, lag))
      left -= len(places)
    return self._arrays(groups)

  def _group(self, rng: np.random.Generator, room: int) -> tuple[list[_Place], int]:
    """One problem's tokens, whole steps that fit into `room`; none if its headers do not. And its lag."""
    mix = self._mix
    problem = self._task.problem(rng)
    size, lag = int(rng.choice(mix.thinkers)), int(rng.choice(mix.lags))
    lag = NEVER if lag < 0 else lag
    names = rng.permutation(list(NAMES))[:size]
    slots = rng.permutation(mix.slots)[:size]
    prompt = encode_prompt(self._tokenizer, problem.prompt)
    header_length = len(self._ids(header_text(NAMES[0])))
    if room < len(prompt) + size * header_length:
      return [], lag
    teacher = dataclasses.replace(
      mix.teacher, max_length=min(mix.teacher.max_length, mix.slot_width - header_length - 1)
    )
    texts = simulate(problem, size, rng, seen=Seen(lag=lag), teacher=teacher)
    ended = [len(text) < teacher.max_length for text in texts]
    written = [
      [
        *self._ids(header_text(name)),
        *self._ids(text),
        *([self._tokenizer.eos_id] if done else []),
      ]
      for name, text, done in zip(names, texts, ended, strict=True)
    ]
    return self._places(prompt, written, given=header_length, slots=slots, room=room), lag

  def _ids(self, text: str) -> list[int]:
    return char_ids(self._tokenizer, text)

  def _places(
    self,
    prompt: Sequence[int],
    written: Sequence[Sequence[int]],
    *,
    given: int,
    slots: np.ndarray,
    room: int,
  ) -> list[_Place]:
    places: list[_Place] = [(token, None, _PROMPT, -1, index) for index, token in enumerate(prompt)]
    for step in range(max(map(len, written))):
      live = [(number, text) for number, text in enumerate(written) if step < len(text)]
      if len(places) + len(live) > room:
        break
      for number, text in live:
        position = len(prompt) + int(slots[number]) * self._mix.slot_width + step
        chosen = step + 1 >= given and step + 1 < len(text)
        places.append((text[step], text[step + 1] if chosen else None, number, step, position))
    return places

  def _arrays(self, groups: Sequence[tuple[Sequence[_Place], int]]) -> Batch:
    row = empty_row(length=self.length, pad_id=self.pad_id)
    zeros, no = np.zeros(self.length, np.int32), np.zeros(self.length, bool)
    owner, step, lags = zeros - 1, zeros - 1, zeros.copy()
    tokens, targets, positions = row.tokens.copy(), row.targets.copy(), row.positions.copy()
    weights, segments = row.weights.copy(), row.segment_ids.copy()
    index = 0
    for segment, (places, lag) in enumerate(groups, start=1):
      for token, target, thinker, number, position in places:
        tokens[index], positions[index] = token, position
        owner[index], step[index] = thinker, number
        segments[index], lags[index] = segment, lag
        if target is not None:
          targets[index], weights[index] = target, 1.0
        index += 1
    return Batch(
      tokens=tokens,
      targets=targets,
      segment_ids=segments,
      positions=positions,
      weights=weights,
      origin=Origins(owner=owner, step=step, rank=owner, lag=lags, by_rank=no, sees_all=no),
    )
