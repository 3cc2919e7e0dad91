"""The arrays of the engine: slots, prefill of one row, and what is read back. One thread owns it.

A slot is a text of a state of groups. A sample has a row of the cache to itself; the thinkers of a request
share one. There are as many rows as slots, so that a free slot always finds a free row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from exitax.decode import (
  CacheChunk,
  CacheFormat,
  Causal,
  DecodeState,
  Gains,
  InGroups,
  NewGroup,
  NewText,
  Requests,
  StepPlan,
  empty_grouping,
  init_state,
  insert_group,
  prefill_chunk,
  read_chunk,
  read_gains,
  release_rows,
  run_singles,
  run_steps,
  start_text,
  stop_texts,
  write_chunk,
)
from exitax.decode.state import NO_TOKEN
from exitax.models import ExitLM, Params
from exitax.serve.jobs import Job, Together
from exitax.serve.memory import check_slots
from exitax.serve.prefix_cache import PrefixCache

# Widths of the windows in which prompts are prefilled: a prompt's last one is the smallest that
# holds what is left.
WINDOWS = (16, 32, 64, 128)
# Tokens of a prompt that are kept or forgotten together.
PREFIX_CHUNK = 32
# Tokens per row that are read back at once; speculation may gain more in a turn.
GAIN_WIDTH = 16
# Tokens seen of slots that nobody reads: more than any text has.
UNREAD = 1 << 30
# Ids that can end a row, at most.
NUM_STOPS = 8


@dataclasses.dataclass(kw_only=True)
class Prefill:
  """A prompt on its way into the cache, in a state of one row.

  Attributes:
    job: what it is for.
    state: the row.
    filled: tokens cached.
    cached: how many of them came from the prefix cache.
    num_inserted: samples that have left for a slot; thinkers leave together and count as one.
  """

  job: Job
  state: DecodeState
  filled: int
  cached: int
  num_inserted: int = 0

  @property
  def ready(self) -> bool:
    """Whether all of the prompt is cached but its last token, which the first step feeds."""
    return self.filled >= len(self.job.prompt) - 1


class SlotBatch:
  """Rows that requests take and leave. Every program has one shape, see `programs`."""

  def __init__(
    self,
    model: ExitLM,
    params: Params,
    *,
    plans: Sequence[StepPlan],
    num_slots: int,
    capacity: int,
    prefix_bytes: int,
    max_thinkers: int = 1,
    group_plans: Sequence[StepPlan] = (),
    cache_format: CacheFormat = CacheFormat.COMPUTE,
  ) -> None:
    """Allocates the slots.

    Args:
      model: the model.
      params: parameters after `prepare_params`.
      plans: what rows may be advanced with; the state is laid out for the first.
      num_slots: texts at once, and rows.
      capacity: tokens of a row at most, prompt included.
      prefix_bytes: what the prefix cache may hold.
      max_thinkers: of a request at most.
      group_plans: those of `plans` that thinkers may be advanced with.
      cache_format: how keys and values are kept.

    Raises:
      UserError: they do not fit into memory.
    """
    self._cache_format = cache_format
    self._model, self._params, self._plans = model, params, tuple(dict.fromkeys(plans))
    self._group_plans = tuple(dict.fromkeys(group_plans)) if max_thinkers > 1 else ()
    self.max_thinkers = max_thinkers
    self._visibility = Causal(model.config.sliding_window)
    self._in_groups = InGroups(model.config.sliding_window)
    # Windows of lanes, padding included, must fit behind the last token.
    overhang = max(*(plan.overhang for plan in plans), max_thinkers)
    columns = -(-(capacity + overhang) // WINDOWS[0]) * WINDOWS[0]
    self.columns = max(columns, PREFIX_CHUNK)  # Programs copy whole chunks.
    self.num_slots, self.capacity = num_slots, capacity
    check_slots(lambda: self._empty(1), num_slots=num_slots, columns=self.columns)
    self._state = self._empty(num_slots)
    cache = self._state.cache
    sizes = (leaf.nbytes for leaf in jax.tree.leaves((cache.layers, cache.heads)))
    self.cache_bytes = sum(sizes)
    self.prefixes: PrefixCache[CacheChunk] = PrefixCache(
      chunk=PREFIX_CHUNK,
      chunk_bytes=self.cache_bytes * PREFIX_CHUNK // (num_slots * self.columns),
      max_bytes=prefix_bytes,
    )

  # Prompts.

  def begin(self, job: Job) -> Prefill:
    """Starts on a prompt, with what is known of its beginning."""
    tokens = np.zeros((1, self.columns), np.int32)
    tokens[0, : len(job.prompt)] = job.prompt
    state = init_state(
      self._model.config,
      self._plans[0],
      tokens=tokens,
      prompt_length=np.asarray([len(job.prompt)], np.int32),
      requests=self._requests(job, job.seeds[0]),
      cache_format=self._cache_format,
    )
    chunks = self.prefixes.find(job.prompt[:-1])
    for i, chunk in enumerate(chunks):
      state = write_chunk(state, chunk, np.int32(i * PREFIX_CHUNK))
    cached = len(chunks) * PREFIX_CHUNK
    return Prefill(job=job, state=state, filled=cached, cached=cached)

  def advance(self, prefill: Prefill) -> int:
    """Caches one window of the prompt; returns its width."""
    left = len(prefill.job.prompt) - 1 - prefill.filled
    width = window_at(prefill.filled, left, columns=self.columns)
    prefill.state = prefill_chunk(
      self._model, self._params, prefill.state, chunk=width, visibility=self._visibility
    )
    jax.block_until_ready(prefill.state.fill)
    prefill.filled += min(width, left)
    if prefill.ready:
      self.prefixes.store(
        prefill.job.prompt[:-1],
        lambda number: read_chunk(
          prefill.state, np.int32(number * PREFIX_CHUNK), chunk=PREFIX_CHUNK
        ),
      )
    return width

  def insert(self, prefill: Prefill, row: int, slots: Sequence[int]) -> None:
    """Copies the prompt into a row for its next sample, or for its thinkers.

    Args:
      prefill: a prompt that is ready.
      row: a row that nobody uses.
      slots: one for each text, that nobody uses.
    """
    job, most = prefill.job, self.max_thinkers
    headers = job.together.headers if job.together else ((),)
    texts = [(*job.prompt, *header) for header in headers]
    tokens = np.zeros((most, self.columns), np.int32)
    for text, line in zip(texts, tokens, strict=False):
      line[: len(text)] = text
    place = [*slots, *[self.num_slots] * (most - len(slots))]
    lengths = [*map(len, texts), *[0] * (most - len(texts))]
    requests = self._requests(job, job.seeds[prefill.num_inserted])
    sees = job.together.sees if job.together else None
    new = NewGroup(
      place=np.asarray(place, np.int32),
      tokens=tokens,
      length=np.asarray(lengths, np.int32),
      shared=len(job.prompt),
      slot_width=job.together.slot_width(job.budget) if job.together else 0,
      lag=sees.lag if sees else 0,
      by_rank=sees.by_rank if sees else False,
      requests=jax.tree.map(lambda x: np.repeat(x, most, axis=0), requests),
    )
    self._state = insert_group(self._state, prefill.state, np.int32(row), new)
    prefill.num_inserted += 1

  # Texts.

  def release(self, slots: Iterable[int]) -> None:
    """Ends the texts in these slots."""
    self._state = release_rows(self._state, self._mask(slots))

  def stop(self, slots: Iterable[int]) -> None:
    """Ends texts where they are; a group that goes on sees what its thinkers wrote."""
    self._state = stop_texts(self._state, self._mask(slots))

  def answer(self, plan: StepPlan, job: Job, row: int, slot: int) -> None:
    """Begins the answer of a group in the slot of one of its thinkers, all of whom have ended."""
    together = job.together
    assert together is not None, 'samples have no answer'
    self._run_groups(plan, 1, [], at_least=1)  # The answer reads their last tokens too.
    begin = together.answer or job.prompt[-1:]
    header = np.zeros((self.columns,), np.int32)
    header[: len(begin)] = begin
    requests = self._requests(job, job.seeds[0], budget=together.answer_budget)
    self._state = start_text(
      self._state,
      np.int32(slot),
      NewText(
        row=row,
        header=header,
        header_length=len(begin),
        number=together.size,
        slot=together.size,
        slot_width=together.slot_width(job.budget),
        rank=together.size,
        lag=0,
        by_rank=False,
        sees_all=True,
        requests=requests,
      ),
    )

  def run(
    self, plan: StepPlan, num_steps: int, slots: Iterable[int], *, groups: bool = False
  ) -> None:
    """Advances the texts in these slots; `groups` if thinkers are among them."""
    if groups:
      self._run_groups(plan, num_steps, slots)
    else:
      self._state = run_singles(
        self._model,
        self._params,
        self._state,
        np.int32(num_steps),
        plan=plan,
        visibility=self._visibility,
        texts=self._mask(slots),
      )
    jax.block_until_ready(self._state.step)

  def _run_groups(
    self, plan: StepPlan, num_steps: int, slots: Iterable[int], *, at_least: int = 0
  ) -> None:
    self._state = run_steps(
      self._model,
      self._params,
      self._state,
      np.int32(num_steps),
      plan=plan,
      visibility=self._in_groups,
      rows=self._mask(slots),
      at_least=np.int32(at_least),
    )

  def gains(self, seen: np.ndarray) -> list[Gains]:
    """What texts have gained beyond `seen` (i32 `[slots]`) tokens, on the host.

    Each is `GAIN_WIDTH` tokens wide and goes on where the one before ends.
    """
    parts = [jax.device_get(read_gains(self._state, seen, width=GAIN_WIDTH))]
    while np.any(parts[0].step - seen > GAIN_WIDTH * len(parts)):
      further = seen + np.int32(GAIN_WIDTH * len(parts))
      parts.append(jax.device_get(read_gains(self._state, further, width=GAIN_WIDTH)))
    return parts

  def reset(self) -> None:
    """Empties all slots and forgets all prefixes, after a fault."""
    self.prefixes.clear()
    self._state = self._empty(self.num_slots)

  def programs(self) -> list[Callable[[], object]]:
    """Calls, in this order, that compile everything serving runs; all slots are free afterwards."""
    thresholds = (1.0,) * (len(self._plans[0].segments) - 1)
    job = Job(prompt=(0, 0), seeds=(0, 0), budget=1, strategy='', thresholds=thresholds)
    prefill = self.begin(job)

    def prefill_window(width: int) -> None:
      prefill.state = prefill_chunk(
        self._model, self._params, prefill.state, chunk=width, visibility=self._visibility
      )

    together = Together(headers=((0,),), answer=(0,), answer_budget=1)
    of_thinker = dataclasses.replace(job, together=together, seeds=(0,))

    def copy_chunk() -> None:
      chunk = read_chunk(prefill.state, np.int32(0), chunk=PREFIX_CHUNK)
      prefill.state = write_chunk(prefill.state, chunk, np.int32(0))

    calls = [
      *(functools.partial(prefill_window, width) for width in WINDOWS if width <= self.columns),
      copy_chunk,
      functools.partial(self.insert, prefill, 0, [0]),
      *(functools.partial(self.run, plan, 1, [0]) for plan in self._plans),
      functools.partial(self.stop, [0]),
      *(functools.partial(self.answer, plan, of_thinker, 0, 0) for plan in self._group_plans),
      functools.partial(self.gains, np.zeros(self.num_slots, np.int32)),
      functools.partial(self.release, range(self.num_slots)),
    ]
    # Twice: what comes out of a program may lie on the devices in another way than what began.
    return calls * 2

  def _empty(self, rows: int) -> DecodeState:
    exits = len(self._plans[0].segments) - 1
    requests = Requests(
      seed=np.zeros(rows, np.uint32),
      temperature=np.zeros(rows, np.float32),
      top_k=np.zeros(rows, np.int32),
      top_p=np.ones(rows, np.float32),
      min_p=np.zeros(rows, np.float32),
      stop_tokens=np.full((rows, NUM_STOPS), NO_TOKEN, np.int32),
      budget=np.zeros(rows, np.int32),
      thresholds=np.ones((rows, exits), np.float32),
    )
    return init_state(
      self._model.config,
      self._plans[0],
      tokens=np.zeros((rows, self.columns), np.int32),
      prompt_length=np.zeros(rows, np.int32),
      requests=requests,
      cache_format=self._cache_format,
      group=empty_grouping(rows, max_lanes=self.max_thinkers),
    )

  def _requests(self, job: Job, seed: int, *, budget: int | None = None) -> Requests:
    stops = [*job.stop_tokens, *[NO_TOKEN] * (NUM_STOPS - len(job.stop_tokens))]
    return Requests(
      seed=np.asarray([seed & 0xFFFFFFFF], np.uint32),
      temperature=np.asarray([job.sampler.temperature], np.float32),
      top_k=np.asarray([job.sampler.top_k], np.int32),
      top_p=np.asarray([job.sampler.top_p], np.float32),
      min_p=np.asarray([job.sampler.min_p], np.float32),
      stop_tokens=np.asarray([stops], np.int32),
      budget=np.asarray([job.budget if budget is None else budget], np.int32),
      thresholds=np.asarray([job.thresholds], np.float32).reshape(1, -1),
    )

  def _mask(self, slots: Iterable[int]) -> np.ndarray:
    mask = np.zeros(self.num_slots, bool)
    mask[list(slots)] = True
    return mask


def window_at(filled: int, left: int, *, columns: int) -> int:
  """Width of the next window of a prompt of which `filled` tokens are cached and `left` are not.

  The smallest of `WINDOWS` that holds what is left, or the largest, among those that start at a
  multiple of themselves and end within `columns`, a multiple of the smallest.
  """
  fitting = [w for w in WINDOWS if filled % w == 0 and filled + w <= columns]
  return next((width for width in fitting if width >= left), fitting[-1])
