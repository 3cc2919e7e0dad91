"""Texts of many groups: every problem is posed once, and all ways of thinking meet it with the same names and slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from exitax.checkpoint import LoadedModel
from exitax.data import GroupMix, Progress, StreamDecoder, Tokenizer, encode_prompt, quiet
from exitax.data.group_rows import NAMES, char_ids, header_text
from exitax.data.group_tasks import Problem, Task
from exitax.decode import (
  Completion,
  ExitPolicy,
  Group,
  GroupRun,
  Sampler,
  Sees,
  StopReason,
  ThinkConfig,
  Thinker,
  prepare_params,
)
from exitax.errors import UserError

_STREAM = 0x67726F7570  # Apart from the rows of any training.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Posed:
  """A problem and who thinks about it.

  Attributes:
    problem: the problem.
    prompt: its token ids.
    headers: token ids that each thinker begins with, at least as many as the largest group.
    slots: theirs.
    seed: of all that is drawn.
  """

  problem: Problem
  prompt: tuple[int, ...]
  headers: tuple[tuple[int, ...], ...]
  slots: tuple[int, ...]
  seed: int


@dataclasses.dataclass(frozen=True)
class Text:
  """What one thinker wrote.

  Attributes:
    pieces: the characters that each token added; none for the token that ends the text.
  """

  pieces: tuple[str, ...]

  def first(self, num_tokens: int) -> str:
    """As it stood after so many tokens."""
    return ''.join(self.pieces[:num_tokens])


def pose(
  task: Task, mix: GroupMix, tokenizer: Tokenizer, *, thinkers: int, count: int, seed: int
) -> list[Posed]:
  """Problems at random, with names and slots at random as in training.

  Args:
    task: where problems come from.
    mix: slots there are.
    tokenizer: of the model.
    thinkers: of the largest group.
    count: how many problems.
    seed: two numbers give problems that have nothing in common.

  Raises:
    UserError: more thinkers than slots.
  """
  if thinkers > mix.slots:
    raise UserError(
      f'thinkers={thinkers} are more than the {mix.slots} slots that the model was trained with: take '
      f'fewer, or bind GroupMix.slots={thinkers} to see what happens beyond them'
    )
  posed = []
  for index in range(count):
    rng = np.random.default_rng([_STREAM, seed, index])
    problem = task.problem(rng)
    names = rng.permutation(list(NAMES))[:thinkers]
    posed.append(
      Posed(
        problem=problem,
        prompt=tuple(encode_prompt(tokenizer, problem.prompt)),
        headers=tuple(tuple(char_ids(tokenizer, header_text(name))) for name in names),
        slots=tuple(rng.permutation(mix.slots)[:thinkers].tolist()),
        seed=int(rng.integers(1 << 31)),
      )
    )
  return posed


class GroupWriter:
  """Lets groups think about posed problems, in batches that compile once."""

  def __init__(
    self,
    loaded: LoadedModel,
    *,
    policy: ExitPolicy,
    sampler: Sampler,
    config: ThinkConfig,
    texts: int,
    progress: Progress = quiet,
  ) -> None:
    """Takes a model, under the mesh in use.

    Args:
      loaded: the model.
      policy: where tokens leave the stack of layers.
      sampler: of every thinker.
      config: tokens and slots.
      texts: how many are written at once.
      progress: wraps the batches.
    """
    self._loaded, self._policy, self._sampler = loaded, policy, sampler
    self._config, self._texts, self._progress = config, texts, progress
    self._params = prepare_params(loaded.model, loaded.params)

  def together(
    self, posed: Sequence[Posed], *, size: int, sees: Sees, label: str
  ) -> list[tuple[Text, ...]]:
    """Texts of a group of `size` per problem."""
    groups = [self.group(item, range(size), sees) for item in posed]
    return self._written(groups, label)

  def alone(self, posed: Sequence[Posed], *, size: int, label: str) -> list[tuple[Text, ...]]:
    """Texts of `size` groups of one per problem."""
    groups = [self.group(item, [place], Sees()) for item in posed for place in range(size)]
    texts = [text for (text,) in self._written(groups, label)]
    return [tuple(texts[i : i + size]) for i in range(0, len(texts), size)]

  def group(self, item: Posed, places: Sequence[int], sees: Sees) -> Group:
    """The thinkers at `places` of a posed problem as a group."""
    return Group(
      prompt=item.prompt,
      thinkers=[
        Thinker(
          header=item.headers[place],
          sampler=self._sampler,
          seed=item.seed,
          number=place,
          slot=item.slots[place],
        )
        for place in places
      ],
      sees=sees,
    )

  def begin(self, groups: Sequence[Group], *, stop_tokens: Sequence[int] = ()) -> GroupRun:
    """Groups whose prompts are cached."""
    return GroupRun(
      self._loaded.model,
      self._params,
      groups,
      self._config,
      policy=self._policy,
      stop_tokens=stop_tokens,
    )

  def _written(self, groups: Sequence[Group], label: str) -> list[tuple[Text, ...]]:
    size = max(1, min(self._texts // len(groups[0].thinkers), len(groups)))
    batches = [list(groups[i : i + size]) for i in range(0, len(groups), size)]
    found: list[tuple[Text, ...]] = []
    for batch in self._progress(batches, total=len(batches), label=label):
      # A last batch is filled up with copies, so that it needs no program of its own.
      filled = [*batch, *[batch[-1]] * (size - len(batch))]
      written = self.begin(filled, stop_tokens=self._loaded.tokenizer.stop_ids).finish()
      found += [tuple(map(self._text, group)) for group in written[: len(batch)]]
    return found

  def _text(self, completion: Completion) -> Text:
    decoder = StreamDecoder(self._loaded.tokenizer)
    tokens = completion.tokens.tolist()
    ended = completion.stop_reason is StopReason.STOP_TOKEN
    pieces = [decoder.push(token) for token in (tokens[:-1] if ended else tokens)]
    return Text((*pieces, '') if ended else tuple(pieces))
