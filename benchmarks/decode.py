"""Tokens/s of decoding: the fraction of the roofline reached, and transformers beside it.

  python benchmarks/decode.py [--quick | --full]

A Llama shape of 27.8M parameters (8 layers, width 512, vocabulary 4096, tied), float32, random
weights, greedy. The roofline of a step is max(bytes / bandwidth, flops / matmul rate): bytes are the
weights, once, and the cached keys and values that exist; both rates are measured in this run, between
the other timings. The products of these steps are timed alone too: what they lack of the roofline no
arrangement of the rest can win back. transformers' `generate` runs the same weights, and its logits are
checked first.

The rows of other strategies show what each costs and saves at its extremes, on exits that know nothing:
a threshold of 1 evaluates every exit and never stops, a threshold of 0 stops every token at the first
exit; speculation whose drafts are never accepted loses what a wrong draft costs, and the adaptive rule
should soon leave it alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import (
  Effort,
  Goal,
  effort_from_arguments,
  finish,
  in_turns,
  median_ratio,
  say,
  seconds_of,
)
from decode_products import DecodeProducts
from llama_twin import make_llama
from roofline import measured_rates, rate_measures, step_bound
from step_timer import StepTimer

from exitax import decode
from exitax.models import ExitConfig, ExitLM, ModelConfig, Params, logits_at_exits

CONFIG = ModelConfig(
  vocab_size=4096, num_layers=8, embed_dim=512, num_heads=8, mlp_dim=1408, max_length=512
)
EXITS = (ExitConfig(layer=2), ExitConfig(layer=4))
PROMPT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One row of the table.

  Attributes:
    name: what it is called.
    policy: how deep tokens go.
    batch: requests at once.
  """

  name: str
  policy: decode.ExitPolicy
  batch: int = 1


def cases(effort: Effort) -> list[Case]:
  """Full depth in several batches, and the other strategies at their extremes."""
  batches = {Effort.QUICK: (1, 4, 16), Effort.NORMAL: (1, 4, 16, 64)}
  full = [
    Case(name='full', policy=decode.FullDepth(), batch=batch)
    for batch in batches.get(effort, (1, 2, 4, 8, 16, 32, 64))
  ]
  deferred = [
    Case(name='deferred, never exits', policy=decode.DeferredExit(threshold=1.0)),
    Case(name='deferred, always exits at 2', policy=decode.DeferredExit(threshold=0.0)),
  ]
  if effort is Effort.QUICK:
    return [*full, *deferred]
  others = [
    Case(name='recompute, always exits at 2', policy=decode.RecomputeExit(threshold=0.0)),
    Case(name='copy_state, always exits at 2', policy=decode.CopyStateExit(threshold=0.0)),
    Case(name='speculative, 3 drafts at 2', policy=decode.Speculative(exit_layer=2, num_drafts=3)),
    Case(name='speculative, adaptive', policy=decode.Speculative()),
  ]
  wide = [
    dataclasses.replace(case, batch=8) for case in (*deferred, *others) if effort is Effort.FULL
  ]
  return [*full, *deferred, *others, *wide]


class Ours:
  """A case, compiled: times of its steps alone and of the whole call."""

  def __init__(self, case: Case, params: Params, *, new_tokens: int) -> None:
    exits = () if isinstance(case.policy, decode.FullDepth) else EXITS
    self.case = case
    self.model = ExitLM(dataclasses.replace(CONFIG, exits=exits))
    self.params = decode.prepare_params(self.model, _with_exit_norms(params, self.model))
    self.new_tokens = new_tokens
    self.prompts = _prompts(case.batch)
    self.steps = StepTimer(
      self.model, self.params, case.policy, self.prompts, new_tokens=new_tokens
    )
    self.call()

  def call(self) -> float:
    """Seconds of `decode.generate`, prompt included."""
    start = time.perf_counter()
    self.result = decode.generate(
      self.model,
      self.params,
      self.prompts,
      max_new_tokens=self.new_tokens,
      policy=self.case.policy,
    )
    return time.perf_counter() - start


class Theirs:
  """transformers' Llama with the same weights."""

  def __init__(self, params: Params, *, new_tokens: int) -> None:
    self.model = make_llama(CONFIG, params).eval()
    self.model.generation_config.use_cache = True
    self.new_tokens = new_tokens
    self.input = torch.tensor(_prompts(1))
    _check_logits(params, self.model)
    self.call()

  def call(self) -> float:
    """Seconds of `generate`, prompt included."""
    start = time.perf_counter()
    with torch.inference_mode():
      output = self.model.generate(
        self.input,
        attention_mask=torch.ones_like(self.input),
        max_new_tokens=self.new_tokens,
        min_new_tokens=self.new_tokens,
        do_sample=False,
        use_cache=True,
      )
    seconds = time.perf_counter() - start
    if output.shape[1] != PROMPT + self.new_tokens:
      raise RuntimeError(f'transformers generated {output.shape[1] - PROMPT} tokens')
    self.tokens = output[0, PROMPT:].tolist()
    return seconds


def main() -> None:
  """Measures everything in turns, and prints a table and one JSON object."""
  effort = effort_from_arguments(__doc__)
  new_tokens, repeats = (64, 3) if effort is Effort.QUICK else (192, 9)
  params = ExitLM(CONFIG).init(jax.random.key(0))
  say('compiling')
  ours = [Ours(case, params, new_tokens=new_tokens) for case in cases(effort)]
  theirs = Theirs(params, new_tokens=new_tokens)
  measures: dict[str, Callable[[], float]] = {**rate_measures(), 'theirs': theirs.call}
  for i, case in enumerate(ours):
    measures |= {f'steps_{i}': case.steps.seconds}
  measures |= {'call': ours[0].call}
  full = [case for case in ours if isinstance(case.case.policy, decode.FullDepth)]
  for case in full:
    products = DecodeProducts(case.model, case.params, batch=case.case.batch, num_steps=new_tokens)
    measures[f'products_{case.case.batch}'] = lambda act=products: seconds_of(act)
  seconds = in_turns(measures, repeats)
  rows = [_row(case, i, seconds) for i, case in enumerate(ours)]
  rows.append(
    {
      'name': 'transformers generate',
      'batch': 1,
      'ms_per_step': statistics.median(seconds['theirs']) / new_tokens * 1e3,
      'tokens_per_s': new_tokens / statistics.median(seconds['theirs']),
      'same_tokens': float(np.mean(np.equal(theirs.tokens, ours[0].result.tokens[0]))),
    }
  )
  batched = [row['of_roofline'] for row in rows if 'of_roofline' in row and row['batch'] > 1]
  goals = [
    Goal(
      name='vs_transformers',
      value=median_ratio(seconds['theirs'], seconds['call']),
      op='>=',
      goal=3.0,
    ),
    Goal(name='of_roofline', value=rows[0]['of_roofline'], op='>=', goal=0.9),
    Goal(name='of_roofline_batched', value=min(batched), op='>=', goal=0.7),
  ]
  finish('decode', rows, goals)


# Accounting.


def _row(ours: Ours, index: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
  batch, new_tokens = ours.case.batch, ours.new_tokens
  steps = seconds[f'steps_{index}']
  row: dict[str, Any] = {
    'name': ours.case.name,
    'batch': batch,
    'ms_per_step': statistics.median(steps) / new_tokens * 1e3,
    'tokens_per_s': batch * new_tokens / statistics.median(steps),
    'vs_full': median_ratio(seconds['steps_0'], steps) * batch,
    'effective_layers': ours.steps.effective_layers,
  }
  if isinstance(ours.case.policy, decode.FullDepth):
    rates = measured_rates(seconds)
    bounds = [
      new_tokens
      * step_bound(
        CONFIG,
        ours.params,
        rows=[(PROMPT + (new_tokens - 1) / 2, 1)] * batch,
        bandwidth=bandwidth,
        matmul_rate=rate,
      )
      for bandwidth, rate in rates
    ]
    row |= {
      'bound_ms': statistics.median(bounds) / new_tokens * 1e3,
      'of_roofline': median_ratio(bounds, steps),
      'products_of_roofline': median_ratio(bounds, seconds[f'products_{batch}']),
      'gb_per_s': statistics.median(rate[0] for rate in rates) / 1e9,
      'gflop_per_s': statistics.median(rate[1] for rate in rates) / 1e9,
    }
  return row


# The same weights on both sides.


def _with_exit_norms(params: Params, model: ExitLM) -> Params:
  """The same backbone with freshly initialised exit heads."""
  return {**model.init(jax.random.key(1)), **params}


def _check_logits(params: Params, model: Any) -> None:
  tokens = jnp.asarray(_prompts(1))
  positions = jnp.arange(PROMPT)[None]
  ours = logits_at_exits(ExitLM(CONFIG), params, tokens, jnp.ones_like(tokens), positions)[-1]
  with torch.inference_mode():
    theirs = model(torch.tensor(_prompts(1))).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-3)


def _prompts(batch: int) -> list[list[int]]:
  rng = np.random.default_rng(0)
  return rng.integers(0, CONFIG.vocab_size, (batch, PROMPT)).tolist()


if __name__ == '__main__':
  main()
