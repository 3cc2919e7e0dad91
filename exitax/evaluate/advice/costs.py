"""What the parts of a decoding step take on this machine, each timed alone and in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from exitax.data import Progress, quiet
from exitax.decode import (
  Causal,
  Confidence,
  ExitPlan,
  KVCache,
  consecutive_lanes,
  draft_buckets,
  extend,
  init_cache,
  prepare_params,
)
from exitax.decode.compiling import decode_jit
from exitax.decode.extend import copy_state
from exitax.decode.scores import head_logits
from exitax.evaluate.advice.rounds import Work
from exitax.models import ExitConfig, ExitLM, Params

# A part is timed over so many passes in one program, so that starting the program does not count.
_PASSES = 48
_SETTLE_SECONDS = 0.02
WHOLES = ('full', 'deferred', 'copy_state')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCosts:
  """Seconds per pass, one row, medians.

  Attributes:
    layers: (segment, lanes) -> layers of the segment.
    heads: per exit, scores and confidence of one lane.
    final: lanes -> final head.
    copies: per segment, keys and values made of an exit's stream; 0 for the first.
    wholes: whole steps, the loop and the choice of tokens included, by kind (`WHOLES`): what they take
      beside their parts is charged to every step of the same kind.
  """

  layers: Mapping[tuple[int, int], float]
  heads: tuple[float, ...]
  final: Mapping[int, float]
  copies: tuple[float, ...]
  wholes: Mapping[str, float]

  @property
  def num_segments(self) -> int:
    """Spans of layers between exits."""
    return len(self.copies)

  @property
  def step(self) -> float:
    """A whole step of full depth."""
    return self.wholes['full']

  def overhead(self, kind: str) -> float:
    """What a whole step of `kind` takes beside its parts; one of 'full', 'deferred', 'copy_state'."""
    parts = sum(self.layers[segment, 1] for segment in range(self.num_segments)) + self.final[1]
    if kind != 'full':
      parts += sum(self.heads)  # No token exits, but every exit is asked.
    return max(self.wholes[kind] - parts, 0.0)

  def of_work(self, work: Work, kind: str) -> float:
    """Seconds per token of 'deferred' or 'copy_state'."""
    seconds = work.tokens * self.overhead(kind)
    seconds += sum(self.layers[part] * count for part, count in work.passes.items())
    seconds += sum(
      cost * n for cost, n in zip((*self.heads, self.final[1]), work.heads, strict=True)
    )
    seconds += sum(cost * n for cost, n in zip(self.copies, work.copies, strict=True))
    return seconds / work.tokens

  def to_rows(self, segments: tuple[range, ...]) -> list[dict[str, Any]]:
    """One plain record per part."""
    rows = [
      {'part': _span(segments[segment]), 'lanes': lanes, 'seconds': seconds}
      for (segment, lanes), seconds in sorted(self.layers.items())
    ]
    rows += [
      {'part': f'head of exit {segments[i].stop}', 'lanes': 1, 'seconds': seconds}
      for i, seconds in enumerate(self.heads)
    ]
    rows += [
      {'part': 'final head', 'lanes': lanes, 'seconds': seconds}
      for lanes, seconds in sorted(self.final.items())
    ]
    rows += [
      {'part': f'copied keys of {_span(segments[i])}', 'lanes': 1, 'seconds': self.copies[i]}
      for i in range(1, len(segments))
    ]
    names = {
      'full': 'whole step of full depth',
      'deferred': 'whole step of deferred exits, none taken',
      'copy_state': 'whole step of copied states, no exit taken',
    }
    return rows + [
      {'part': name, 'lanes': 1, 'seconds': self.wholes[kind]} for kind, name in names.items()
    ]


def measure_costs(
  model: ExitLM,
  params: Params,
  *,
  plan: ExitPlan,
  max_drafts: int,
  context: int,
  capacity: int,
  wholes: Mapping[str, Callable[[], float]],
  repeats: int,
  progress: Progress = quiet,
) -> PartCosts:
  """Times every part `repeats` times, all in turn, so that a slow spell slows all of them.

  Args:
    model: the model.
    params: its parameters.
    plan: of deferred exits: segments, lanes and the measure of confidence.
    max_drafts: most drafts of a round: verification is timed over as many lanes.
    context: tokens in the cache.
    capacity: columns of the cache, as decoding has it.
    wholes: for each of `WHOLES`, a function that decodes and returns the seconds of one step.
    repeats: times of each.
    progress: wraps the repeats.
  """
  params = prepare_params(model, params)
  timer = _Timer(model, params, plan=plan, context=context, capacity=capacity)
  lanes = tuple(sorted({*plan.lane_buckets, *draft_buckets(max_drafts)}))
  deep = range(1, len(plan.segments))
  parts: dict[Any, Callable[[], float]] = {('layers', 0, 1): timer.layers(0, 1)}
  for number in lanes:
    parts |= {('layers', segment, number): timer.layers(segment, number) for segment in deep}
    parts['final', number] = timer.head(None, number)
  parts |= {('head', i): timer.head(item, 1) for i, item in enumerate(plan.exits)}
  parts |= {('copy', segment): timer.copies(segment) for segment in deep}
  parts |= {('whole', kind): wholes[kind] for kind in WHOLES}
  seconds: dict[Any, list[float]] = {name: [] for name in parts}
  for name in progress(list(parts), total=len(parts), label='compiling the parts of a step'):
    parts[name]()
  turns = [(turn, name) for turn in range(repeats) for name in parts]
  for _, name in progress(turns, total=len(turns), label='timing the parts of a step'):
    time.sleep(_SETTLE_SECONDS)  # Threads of the part before must come to rest.
    seconds[name].append(parts[name]())
  median = {name: statistics.median(values) for name, values in seconds.items()}
  return PartCosts(
    layers={name[1:]: value for name, value in median.items() if name[0] == 'layers'},
    heads=tuple(median['head', i] for i in range(len(plan.exits))),
    final={number: median['final', number] for number in lanes},
    copies=(0.0, *(median['copy', segment] for segment in deep)),
    wholes={kind: median['whole', kind] for kind in WHOLES},
  )


class _Timer:
  """Makes functions that run a part and return its seconds per pass."""

  def __init__(
    self, model: ExitLM, params: Params, *, plan: ExitPlan, context: int, capacity: int
  ) -> None:
    self._model, self._params, self._plan = model, params, plan
    self._context, self._capacity = context, capacity
    self._visibility = Causal(model.config.sliding_window)

  def layers(self, segment: int, num_lanes: int) -> Callable[[], float]:
    layers = self._plan.segments[segment]

    def run() -> float:
      return self._seconds(
        lambda: _run_layers(
          self._model,
          self._params,
          self._cache(),
          self._stream(num_lanes),
          self._context,
          _PASSES,
          layers=layers,
          visibility=self._visibility,
        )
      )

    return run

  def copies(self, segment: int) -> Callable[[], float]:
    layers = self._plan.segments[segment]

    def run() -> float:
      return self._seconds(
        lambda: _run_copies(
          self._model,
          self._params,
          self._cache(),
          self._stream(1),
          self._context,
          _PASSES,
          layers=layers,
        )
      )

    return run

  def head(self, exit_config: ExitConfig | None, num_lanes: int) -> Callable[[], float]:
    def run() -> float:
      return self._seconds(
        lambda: _run_head(
          self._model,
          self._params,
          self._stream(num_lanes)[0],
          _PASSES,
          exit_config=exit_config,
          confidence=self._plan.confidence,
        )
      )

    return run

  def _seconds(self, act: Callable[[], Any]) -> float:
    jax.block_until_ready((self._params, self._cache()))
    start = time.perf_counter()
    jax.block_until_ready(act())
    return (time.perf_counter() - start) / _PASSES

  def _cache(self) -> KVCache:
    config, plan = self._model.config, self._plan
    cache = init_cache(config, rows=1, capacity=self._capacity, head_layers=plan.head_layers)
    place = jnp.arange(self._capacity)[None]
    columns = dataclasses.replace(cache.columns, position=place, valid=place < self._context)
    return jax.block_until_ready(dataclasses.replace(cache, columns=columns))

  def _stream(self, num_lanes: int) -> jax.Array:
    config = self._model.config
    key = jax.random.key(0)
    return jax.random.normal(key, (1, num_lanes, config.embed_dim)).astype(config.precision.dtype)


@decode_jit(static=('model', 'layers', 'visibility'), donated=('cache',))
def _run_layers(
  model: ExitLM,
  params: Params,
  cache: KVCache,
  stream: jax.Array,
  first: int,
  num_passes: int,
  *,
  layers: range,
  visibility: Causal,
) -> Any:
  lanes = _lanes(first, stream.shape[1])

  def once(_: Any, carry: Any) -> Any:
    cache, hidden = carry
    after = extend(model, params, cache, hidden, lanes, layers=layers, visibility=visibility)
    # The next pass needs this one's outcome, and stays in range.
    return after.cache, stream + 1e-3 * jnp.tanh(after.hidden)

  return jax.lax.fori_loop(0, num_passes, once, (cache, stream))


@decode_jit(static=('model', 'layers'), donated=('cache',))
def _run_copies(
  model: ExitLM,
  params: Params,
  cache: KVCache,
  stream: jax.Array,
  first: int,
  num_passes: int,
  *,
  layers: range,
) -> Any:
  lanes = _lanes(first, stream.shape[1])

  def once(_: Any, carry: Any) -> Any:
    cache, hidden = carry
    cache = copy_state(model, params, cache, hidden, lanes, layers=layers)
    written = jax.tree.leaves(cache.layers[layers.start].value)[0][0, 0, 0, 0]
    return cache, stream + 1e-3 * jnp.tanh(written)

  return jax.lax.fori_loop(0, num_passes, once, (cache, stream))


@decode_jit(static=('model', 'exit_config', 'confidence'), donated=())
def _run_head(
  model: ExitLM,
  params: Params,
  features: jax.Array,
  num_passes: int,
  *,
  exit_config: ExitConfig | None,
  confidence: Confidence,
) -> Any:
  def once(_: Any, carry: Any) -> Any:
    x, chosen = carry
    scores = head_logits(model, params, exit_config, x)
    measured = confidence(scores) if confidence.reads_one_exit else scores[:, 0]
    chosen = chosen + jnp.argmax(scores, axis=-1)
    return features + 1e-3 * measured[:, None].astype(features.dtype), chosen

  start = (features, jnp.zeros(features.shape[0], jnp.int32))
  return jax.lax.fori_loop(0, num_passes, once, start)


def _lanes(first: Any, num_lanes: int) -> Any:
  start = jnp.asarray(first, jnp.int32)[None]
  return consecutive_lanes(start, jnp.full_like(start, num_lanes), num_lanes=num_lanes)


def _span(layers: range) -> str:
  return f'layers {layers.start}:{layers.stop}'
