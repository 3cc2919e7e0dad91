"""A trained model decoded at full depth and, if it has exits, in every way of speculating with them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Effort, median_ratio, say
from roofline import measured_rates, step_bound
from step_timer import StepTimer
from trained import held_out, held_out_loss, trained

from exitax import decode
from exitax.checkpoint import LoadedModel
from exitax.evaluate import measure_draft_costs
from exitax.models import logits_at_exits

PROMPT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """How much is decoded."""

  prompts: int
  new_tokens: int
  repeats: int


SIZES = {
  Effort.QUICK: Size(prompts=2, new_tokens=32, repeats=2),
  Effort.NORMAL: Size(prompts=4, new_tokens=192, repeats=5),
  Effort.FULL: Size(prompts=16, new_tokens=256, repeats=7),
}


class Subject:
  """One model at full depth."""

  def __init__(self, name: str, effort: Effort, size: Size) -> None:
    self.name, self.size = name, size
    self.loaded: LoadedModel = trained(name, effort)
    self.model = self.loaded.model
    self.params = decode.prepare_params(self.model, self.loaded.params)
    self.prompts = held_out(self.loaded, count=size.prompts, num_tokens=PROMPT)
    self.full = self._timers(decode.FullDepth())
    self.timers = {'full': self.full}

  def measures(self) -> dict[str, Callable[[], float]]:
    """Seconds of all prompts, one after the other, by name of the way."""
    return {
      f'{self.name}: {way}': lambda timers=timers: sum(timer.seconds() for timer in timers)
      for way, timers in self.timers.items()
    }

  def rows(self, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The table: a row per way."""
    return [self.row(way, seconds) for way in self.timers]

  def row(self, way: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """One way's row."""
    taken, total = seconds[f'{self.name}: {way}'], self.size.new_tokens * len(self.prompts)
    row: dict[str, Any] = {
      'model': self.name,
      'way': way,
      'tokens_per_s': total / statistics.median(taken),
      'speedup': median_ratio(seconds[f'{self.name}: full'], taken),
    }
    if way == 'full':
      bounds = [
        total
        * step_bound(
          self.model.config,
          self.params,
          rows=[(PROMPT + (self.size.new_tokens - 1) / 2, 1)],
          bandwidth=bandwidth,
          matmul_rate=rate,
        )
        for bandwidth, rate in measured_rates(seconds)
      ]
      row |= {
        'of_roofline': median_ratio(bounds, taken),
        'held_out_nll': held_out_loss(self.loaded),
      }
    return row

  def _timers(self, policy: decode.ExitPolicy) -> list[StepTimer]:
    return [
      StepTimer(self.model, self.params, policy, [prompt], new_tokens=self.size.new_tokens)
      for prompt in self.prompts
    ]


class Drafting(Subject):
  """One model with exits, and every way to speculate with it."""

  def __init__(self, name: str, effort: Effort, size: Size) -> None:
    super().__init__(name, effort, size)
    say(f'{name}: costs of rounds')
    length = PROMPT + size.new_tokens
    self.costs = measure_draft_costs(self.model, self.params, length=length)
    steps = [timer.seconds() / size.new_tokens for timer in self.full for _ in range(3)]
    self.step = statistics.median(steps)
    self.agreement = self._agreement()
    self.best = {j: self._best_length(j) for j in range(len(self.model.config.exits))}
    self.timers['adaptive'] = self._timers(decode.Speculative(costs=self.costs))
    self.timers['adaptive, estimated costs'] = self._timers(decode.Speculative())
    for j, num_drafts in self.best.items():
      policy = decode.Speculative(
        exit_layer=self.model.config.exits[j].layer, num_drafts=num_drafts, max_drafts=7
      )
      self.timers[f'exit {policy.exit_layer}, {num_drafts} drafts'] = self._timers(policy)
    self._check_lossless()

  def predicted(self, exit_index: int, num_drafts: int) -> float:
    """Speed-up over full depth, by the formula and the measured seconds of rounds and steps."""
    agreement = jnp.float32(self.agreement[exit_index])
    tokens = float(decode.tokens_per_round(agreement, num_drafts))
    return tokens * self.step / self.costs.rounds[exit_index][num_drafts - 1]

  def row(self, way: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Beside the base's: what rounds gained, and for fixed drafts what was predicted."""
    row = super().row(way, seconds)
    if way != 'full':
      row |= _rounds(self.timers[way], self.size.new_tokens)
    fixed = list(self.timers)[3:]
    if way in fixed:
      index = fixed.index(way)
      row |= {
        'agreement': self.agreement[index],
        'round_ms': self.costs.rounds[index][self.best[index] - 1] * 1e3,
        'predicted': self.predicted(index, self.best[index]),
      }
    return row

  def _agreement(self) -> list[float]:
    """How often each exit ranks the final layer's token first, along the texts of full depth."""
    same = []
    for prompt, timer in zip(self.prompts, self.full, strict=True):
      tokens = jnp.asarray([[*prompt, *timer.tokens[0]]])
      positions = jnp.arange(tokens.shape[1])[None]
      logits = logits_at_exits(
        self.model, self.loaded.params, tokens, jnp.ones_like(tokens), positions
      )
      best = np.asarray(logits[:, 0, len(prompt) - 1 : -1].argmax(-1))
      same.append(best[:-1] == best[-1])
    return [float(x) for x in np.concatenate(same, axis=1).mean(axis=1)]

  def _best_length(self, exit_index: int) -> int:
    lengths = range(1, len(self.costs.rounds[exit_index]) + 1)
    return max(lengths, key=lambda num_drafts: self.predicted(exit_index, num_drafts))

  def _check_lossless(self) -> None:
    expected = [timer.tokens for timer in self.full]
    for way, timers in self.timers.items():
      if [timer.tokens for timer in timers] != expected:
        raise SystemExit(f'{self.name}: {way} wrote another text than full depth')


def _rounds(timers: list[StepTimer], new_tokens: int) -> dict[str, float]:
  stats = [jax.device_get(timer.state.aux.extra[decode.STATS]) for timer in timers]
  drafted = sum(int(x.drafted.sum()) for x in stats)
  accepted = sum(int(x.accepted.sum()) for x in stats)
  rounds = sum(int(x.rounds.sum()) for x in stats)
  return {
    'tokens_per_round': new_tokens * len(timers) / rounds,
    'accepted': accepted / max(drafted, 1),
  }
