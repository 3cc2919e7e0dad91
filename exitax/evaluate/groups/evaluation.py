"""Group Think against its baselines on one task: who covers how much, after how many tokens and milliseconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel
from exitax.data import GroupMix, Progress, quiet
from exitax.data.group_rows import char_ids, header_text
from exitax.data.group_tasks import EnumerationTask, Task
from exitax.decode import ExitPolicy, Sampler, Sees, StrategySettings, ThinkConfig
from exitax.evaluate.facts import machine_facts, model_facts
from exitax.evaluate.groups.config import GroupEvaluateConfig
from exitax.evaluate.groups.curves import REACHES, Bootstrap, Interval, Scores, score, tokens_to
from exitax.evaluate.groups.report import (
  CHAIN,
  GROUP,
  INDEPENDENT,
  LAG,
  MASK_OFF,
  Curve,
  Gain,
  GroupReport,
)
from exitax.evaluate.groups.rollouts import GroupWriter, Posed, Text, pose
from exitax.evaluate.groups.theory import ideal_coverage, independent_coverage
from exitax.evaluate.groups.timing import StepTiming, time_steps


@dataclasses.dataclass(frozen=True)
class Way:
  """How problems are thought about.

  Attributes:
    kind: as `Curve.way`.
    size: thinkers.
    sees: what each sees of the others; None for texts that are requests of their own.
  """

  kind: str
  size: int
  sees: Sees | None

  @property
  def lag(self) -> int | None:
    """In steps; None is never."""
    return None if self.kind in (CHAIN, INDEPENDENT, MASK_OFF) or not self.sees else self.sees.lag

  @property
  def label(self) -> str:
    """For a progress bar."""
    lag = f' {self.lag}' if self.kind == LAG else ''
    return f'{self.kind.replace("_", " ")}{lag}, {self.size} thinkers'


def evaluate_groups(
  loaded: LoadedModel,
  task: Task,
  mix: GroupMix,
  config: GroupEvaluateConfig,
  *,
  mesh: Mesh,
  progress: Progress = quiet,
) -> GroupReport:
  """Measures every way that `config` asks for on the same problems; the mesh must be in use.

  Args:
    loaded: the model.
    task: where problems come from.
    mix: slots of its training.
    config: how much.
    mesh: one device.
    progress: wraps what takes long.

  Raises:
    UserError: more thinkers than slots, tokens that exceed a slot or the context.
  """
  start = time.monotonic()
  tokenizer = loaded.tokenizer
  header = len(char_ids(tokenizer, header_text('A')))
  think = ThinkConfig(
    max_new_tokens=config.tokens or max(mix.slot_width - header, 1), slot_width=mix.slot_width
  )
  posed = [
    item
    for seed in range(config.seeds)
    for item in pose(
      task, mix, tokenizer, thinkers=max(config.thinkers), count=config.prompts, seed=seed
    )
  ]
  writer = GroupWriter(
    loaded,
    policy=_policy(loaded, config),
    sampler=Sampler(temperature=config.temperature, top_p=config.top_p),
    config=think,
    texts=config.texts,
    progress=progress,
  )
  problems = [item.problem for item in posed]
  scores = {
    way: score(problems, texts, think.max_new_tokens)
    for way, texts in _texts(writer, posed, config).items()
  }
  # The last token is chosen, and not fed.
  steps = min(config.speed_steps, think.max_new_tokens - 2)
  timing = StepTiming(steps=steps, repeats=config.speed_repeats)
  step_ms = _step_ms(writer, posed[0], scores, timing, progress) if steps > 0 else {}
  bootstrap = Bootstrap(len(posed), resamples=config.resamples)
  return GroupReport(
    model=model_facts(loaded),
    machine=machine_facts(mesh),
    task=task.name,
    settings=repr(task),
    problems=len(posed),
    seeds=config.seeds,
    tokens=think.max_new_tokens,
    curves=tuple(
      _curve(way, found, bootstrap(found.coverage), task, step_ms.get(way))
      for way, found in scores.items()
    ),
    gains=_gains(scores, bootstrap),
    seconds=time.monotonic() - start,
  )


def _policy(loaded: LoadedModel, config: GroupEvaluateConfig) -> ExitPolicy:
  strategy = 'full' if config.threshold is None else 'deferred'
  settings = StrategySettings(
    strategy=strategy, threshold=config.threshold, confidence=config.confidence
  )
  return settings.policy(loaded.model.config)


def _texts(
  writer: GroupWriter, posed: Sequence[Posed], config: GroupEvaluateConfig
) -> dict[Way, list[tuple[Text, ...]]]:
  """What every way wrote; chain of thought is the first of the independent texts."""
  most = max(config.thinkers) if config.baselines else 1
  chain = Way(CHAIN, 1, None)
  alone = writer.alone(posed, size=most, label=chain.label if most == 1 else 'independent texts')
  found = {chain: [group[:1] for group in alone]}
  for size in config.thinkers:
    ways = [Way(GROUP, size, Sees())]
    if config.baselines:
      found[Way(INDEPENDENT, size, None)] = [group[:size] for group in alone]
      ways.append(Way(MASK_OFF, size, Sees.parse('none')))
      ways += [Way(LAG, size, Sees(lag=lag)) for lag in config.lags]
    for way in ways:
      assert way.sees is not None
      found[way] = writer.together(posed, size=size, sees=way.sees, label=way.label)
  return found


def _step_ms(
  writer: GroupWriter,
  posed: Posed,
  ways: Iterable[Way],
  timing: StepTiming,
  progress: Progress,
) -> dict[Way, float]:
  """Milliseconds of a step; what a group sees does not change them."""

  def name(way: Way) -> str:
    return f'{way.size} requests' if way.sees is None else f'group of {way.size}'

  groups = {
    name(way): [writer.group(posed, [place], Sees()) for place in range(way.size)]
    if way.sees is None
    else [writer.group(posed, range(way.size), Sees())]
    for way in ways
  }
  taken = time_steps(writer.begin, groups, timing, progress=progress)
  return {way: taken[name(way)] for way in ways}


def _curve(
  way: Way, scores: Scores, interval: Interval, task: Task, step_ms: float | None
) -> Curve:
  theory = _theory(way, task, len(interval.mean) - 1)
  return Curve(
    way=way.kind,
    thinkers=way.size,
    lag=way.lag,
    coverage=_numbers(interval.mean),
    low=_numbers(interval.low),
    high=_numbers(interval.high),
    total_tokens=_numbers(scores.tokens),
    theory=None if theory is None else _numbers(theory),
    step_ms=step_ms,
    fair_share=scores.fair_share,
    duplicate_share=scores.duplicate_share,
    tokens_to={str(reach): tokens_to(interval.mean, reach) for reach in REACHES},
  )


def _theory(way: Way, task: Task, num_tokens: int) -> np.ndarray | None:
  if not isinstance(task, EnumerationTask) or task.item_length > 1 or way.kind == LAG:
    return None
  if way.kind == GROUP:
    return ideal_coverage(task.num_items, way.size, num_tokens)
  return independent_coverage(task.num_items, way.size, num_tokens)


def _gains(scores: Mapping[Way, Scores], bootstrap: Bootstrap) -> tuple[Gain, ...]:
  gains = []
  for way, found in scores.items():
    apart = scores.get(Way(INDEPENDENT, way.size, None))
    if way.kind == GROUP and apart is not None:
      interval = bootstrap(found.coverage - apart.coverage)
      gains.append(
        Gain(
          thinkers=way.size,
          mean=_numbers(interval.mean),
          low=_numbers(interval.low),
          high=_numbers(interval.high),
        )
      )
  return tuple(gains)


def _numbers(values: np.ndarray) -> tuple[float, ...]:
  return tuple(values.tolist())
