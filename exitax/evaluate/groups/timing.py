"""What a step takes: one group of N, or N requests, with nothing beside it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from exitax.data import Progress, quiet
from exitax.decode import Group, GroupRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTiming:
  """How steps are timed.

  Attributes:
    steps: that are timed; the first ones, which feed headers, are left out.
    repeats: of every way, in turns.
  """

  steps: int
  repeats: int


def time_steps(
  begin: Callable[[Sequence[Group]], GroupRun],
  ways: Mapping[str, Sequence[Group]],
  timing: StepTiming,
  *,
  progress: Progress = quiet,
) -> dict[str, float]:
  """Median milliseconds of a step of each way, measured in turns.

  Args:
    begin: caches the prompts of groups whose texts do not end while they are timed.
    ways: groups of each way, thought about at once.
    timing: how much.
    progress: wraps the rounds.
  """

  def seconds(groups: Sequence[Group]) -> float:
    run = begin(groups)
    longest = max(len(thinker.header) for group in groups for thinker in group.thinkers)
    run.advance(longest + 1)  # The prompt's last token, and the headers.
    jax.block_until_ready(run.state)
    start = time.perf_counter()
    run.advance(timing.steps)
    return time.perf_counter() - start

  for groups in ways.values():
    seconds(groups)  # Compiles.
  taken: dict[str, list[float]] = {name: [] for name in ways}
  for _ in progress(range(timing.repeats), total=timing.repeats, label='timing steps'):
    for name, groups in ways.items():
      taken[name].append(seconds(groups))
  return {name: statistics.median(values) / timing.steps * 1000 for name, values in taken.items()}
