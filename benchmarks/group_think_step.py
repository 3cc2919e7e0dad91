"""What a step of Group Think takes: N thinkers on one cache, beside the bound and beside N requests.

  python benchmarks/group_think_step.py [--quick | --full]

A Llama shape of 27.8M parameters (8 layers, width 512, vocabulary 4096, tied), float32, random weights, a prompt of
1024 tokens. A group of N reads the weights and its cache once per step; the bound is max(bytes / bandwidth, flops /
matmul rate), with both rates measured in this run between the other timings. N separate requests in one batch,
each with a cache of its own, stand beside it, and a mixed batch: one group of 8 with 7 single requests
is 15 tokens, and `mixed_batch_ratio` sets it beside 15 ordinary requests, whose tokens are flat by nature. These read
fifteen prompts and it reads eight; a group of 15, which reads one, is printed too, and `bound_ms` says how far
they must be apart. Every way's tokens are checked to be as many as asked for.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from common import Effort, Goal, effort_from_arguments, finish, in_turns, median_ratio, say
from roofline import measured_rates, rate_measures, step_bound
from step_timer import StepTimer

from exitax import decode
from exitax.models import ExitLM, ModelConfig, Params

CONFIG = ModelConfig(
  vocab_size=4096, num_layers=8, embed_dim=512, num_heads=8, mlp_dim=1408, max_length=4096
)
PROMPT = 1024
SIZES = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A way of feeding some tokens per step.

  Attributes:
    name: what it is called.
    sizes: thinkers of each group.
    apart: whether they are separate requests instead, one row each.
  """

  name: str
  sizes: tuple[int, ...]
  apart: bool = False

  @property
  def tokens(self) -> int:
    """Fed per step."""
    return sum(self.sizes)

  def num_steps(self, new_tokens: int) -> int:
    """Steps that writing `new_tokens` takes: groups feed the prompt's last token by a step of its own."""
    return new_tokens if self.apart else new_tokens + 1


class Thinking:
  """Groups, compiled; calling it gives the seconds of all steps, prompts aside."""

  def __init__(self, model: ExitLM, params: Params, sizes: Sequence[int], new_tokens: int) -> None:
    self._model, self._params, self._new_tokens = model, params, new_tokens
    prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (len(sizes), PROMPT))
    self._groups = [
      decode.Group(
        prompt=prompt.tolist(),
        thinkers=[decode.Thinker(header=(number + 1,)) for number in range(size)],
      )
      for prompt, size in zip(prompts, sizes, strict=True)
    ]
    self()

  def __call__(self) -> float:
    run = decode.GroupRun(
      self._model, self._params, self._groups, decode.ThinkConfig(max_new_tokens=self._new_tokens)
    )
    jax.block_until_ready(run.state)
    start = time.perf_counter()
    # The prompt's last token and the headers are fed first.
    gained = run.advance(self._new_tokens + 1)
    seconds = time.perf_counter() - start
    if not run.done or any(len(item.tokens) != self._new_tokens for item in gained):
      raise SystemExit('a thinker wrote fewer tokens than asked for')
    return seconds


def main() -> None:
  """Measures all ways in turns, and prints a table and one JSON object."""
  effort = effort_from_arguments(__doc__)
  new_tokens, repeats = {Effort.QUICK: (16, 3), Effort.NORMAL: (64, 7), Effort.FULL: (128, 15)}[
    effort
  ]
  model = ExitLM(CONFIG)
  params = decode.prepare_params(model, model.init(jax.random.key(0)))
  cases = [
    *(Case(name=f'group of {size}', sizes=(size,)) for size in SIZES),
    *(Case(name=f'{size} requests', sizes=(1,) * size, apart=True) for size in SIZES),
    Case(name='group of 8 and 7 requests', sizes=(8, *(1,) * 7)),
    Case(name='15 requests', sizes=(1,) * 15, apart=True),
    Case(name='group of 15', sizes=(15,)),
  ]
  say('compiling')
  acts: dict[str, Callable[[], float]] = {
    case.name: _requests(model, params, case.tokens, new_tokens)
    if case.apart
    else Thinking(model, params, case.sizes, new_tokens)
    for case in cases
  }
  seconds = in_turns({**rate_measures(), **acts}, repeats)
  bounds = {case.name: _bounds(case, params, seconds, new_tokens) for case in cases}
  rows = [_row(case, seconds, bounds[case.name], new_tokens) for case in cases]
  # A step of groups more: the prompt's last token.
  mixed = [x / (new_tokens + 1) for x in seconds['group of 8 and 7 requests']]
  flat = [x / new_tokens for x in seconds['15 requests']]
  goals = [
    Goal(
      name='over_bound_n8',
      value=median_ratio(seconds['group of 8'], bounds['group of 8']),
      op='<=',
      goal=1.15,
    ),
    Goal(
      name='t1_of_bandwidth_bound',
      value=median_ratio(bounds['group of 1'], seconds['group of 1']),
      op='>=',
      goal=0.9,
    ),
    Goal(name='mixed_batch_ratio', value=median_ratio(mixed, flat), op='<=', goal=1.15),
  ]
  finish('group_think_step', rows, goals)


def _requests(model: ExitLM, params: Params, batch: int, new_tokens: int) -> Callable[[], float]:
  prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, PROMPT)).tolist()
  return StepTimer(model, params, decode.FullDepth(), prompts, new_tokens=new_tokens).seconds


def _bounds(
  case: Case, params: Params, seconds: dict[str, list[float]], new_tokens: int
) -> list[float]:
  """Least seconds of all steps, per round."""
  rows = [(PROMPT + size * new_tokens / 2, size) for size in case.sizes]
  return [
    case.num_steps(new_tokens)
    * step_bound(CONFIG, params, rows=rows, bandwidth=bandwidth, matmul_rate=rate)
    for bandwidth, rate in measured_rates(seconds)
  ]


def _row(
  case: Case, seconds: dict[str, list[float]], bounds: list[float], new_tokens: int
) -> dict[str, Any]:
  taken, steps = seconds[case.name], case.num_steps(new_tokens)
  return {
    'way': case.name,
    'tokens_per_step': case.tokens,
    'ms_per_step': statistics.median(taken) / steps * 1e3,
    'bound_ms': statistics.median(bounds) / steps * 1e3,
    'over_bound': median_ratio(taken, bounds),
    'over_one': median_ratio(taken, seconds['group of 1']) * (new_tokens + 1) / steps,
  }


if __name__ == '__main__':
  main()
