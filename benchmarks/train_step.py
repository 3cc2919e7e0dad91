"""Tokens/s of the training step, beside torch + transformers and the step's own matrix products.

  python benchmarks/train_step.py [--quick | --full]

A Llama shape of 27.8M parameters (8 layers, width 512, 8 heads, mlp 1408, vocabulary 4096, tied),
256 tokens a row, AdamW. Both sides start from the same weights and see the same batch, and their
losses before and after an optimizer step must agree. torch runs in each of its modes first, and the
fastest one is measured in turns with ours, in float32 (batch 8) and in bfloat16 mixed precision
(batch 8, or for both sides the largest that fits the time where torch emulates bfloat16).

The bound is every product of the step (forward, d_input, d_weight; weights, attention,
vocabulary) timed alone, the faster of XLA and torch.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from typing import Any

import jax
import numpy as np
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
from llama_twin import TorchMode, TorchTrainer
from our_step import BATCH, CONFIG, LENGTH, OPTIMIZER, TORCH_OPTIMIZER, OurTrainer, make_batch
from step_products import StepProducts

from exitax.data import Batch
from exitax.layers import Precision
from exitax.models import ExitLM

# Losses may differ by rounding: relative, before and after a step.
TOLERANCE = {Precision.FLOAT32: 1e-4, Precision.BFLOAT16: 1e-2}
LONGEST_TORCH_STEP = {Effort.QUICK: 6.0, Effort.NORMAL: 20.0, Effort.FULL: 1e9}  # Seconds.


def main() -> None:
  """Measures both precisions and the bound, and prints table, goals and JSON."""
  effort = effort_from_arguments(__doc__)
  repeats = 3 if effort is Effort.QUICK else 9
  params = ExitLM(CONFIG).init(jax.random.key(0))
  rows, goals = [], []
  for precision in (Precision.FLOAT32, Precision.BFLOAT16):
    new_rows, new_goals = compare(params, precision, effort, repeats)
    rows += new_rows
    goals += new_goals
    gc.collect()
  finish('train_step', rows, goals)


def compare(
  params: Any, precision: Precision, effort: Effort, repeats: int
) -> tuple[list[dict[str, Any]], list[Goal]]:
  """Rows and goals of one precision."""
  name = {Precision.FLOAT32: 'fp32', Precision.BFLOAT16: 'bf16'}[precision]
  bfloat16 = precision is Precision.BFLOAT16
  say(f'{name}: choosing the batch')
  batch_size = _batch_size(params, bfloat16, LONGEST_TORCH_STEP[effort])
  batch = make_batch(batch_size)
  theirs, rows = fastest_torch(params, batch, bfloat16, effort)
  say('compiling exitax')
  ours = OurTrainer(dataclasses.replace(CONFIG, precision=precision), params, batch)
  losses = [(ours.step(), theirs.first_losses[i]) for i in range(2)]
  np.testing.assert_allclose(*zip(*losses, strict=True), rtol=TOLERANCE[precision])
  measures = {'ours': lambda: seconds_of(ours.step), 'theirs': lambda: seconds_of(theirs.step)}
  # The bound is float32's: bfloat16 has no bound of its own on CPUs that emulate it.
  products = None if bfloat16 else StepProducts(CONFIG, batch=batch_size, length=LENGTH)
  if products:
    measures |= {'xla products': products.run_xla, 'torch products': products.run_torch}
  seconds = in_turns(measures, repeats)
  tokens = batch_size * LENGTH

  def row(contender: str, second: float, **others: Any) -> dict[str, Any]:
    return {
      'contender': contender,
      'precision': name,
      'batch': batch_size,
      'tokens_per_s': tokens / second,
      'ms': second * 1e3,
      **others,
    }

  median = {key: statistics.median(values) for key, values in seconds.items()}
  compile_seconds = ours.compile_seconds
  rows.append(
    row('exitax', median['ours'], repeats=repeats, loss=losses[0][0], compile_s=compile_seconds)
  )
  rows.append(row(theirs.mode.name, median['theirs'], repeats=repeats, loss=losses[0][1]))
  goal = 0.8 if bfloat16 else 1.0
  vs_torch = median_ratio(seconds['theirs'], seconds['ours'])
  goals = [Goal(name=f'{name}_vs_torch', value=vs_torch, op='>=', goal=goal)]
  if products:
    rows += [row(key, median[key], repeats=repeats) for key in ('xla products', 'torch products')]
    bound = products.bound()
    rows.append(row('own matmuls', bound, gflop_s=products.flops / bound / 1e9))
    share = bound / median['ours']
    goals.append(Goal(name=f'{name}_of_own_matmuls', value=share, op='>=', goal=0.6))
  return rows, goals


def fastest_torch(
  params: Any, batch: Batch, bfloat16: bool, effort: Effort
) -> tuple[TorchTrainer, list[dict[str, Any]]]:
  """torch in its fastest mode, with its first two losses; and a row per mode that was tried."""
  modes = [
    TorchMode(attention=attention, compiled=compiled, bfloat16=bfloat16)
    for attention, compiled in (('sdpa', False), ('eager', False), ('sdpa', True), ('eager', True))
  ]
  if effort is Effort.QUICK:
    modes = modes[:1]
  best, best_seconds, rows = None, float('inf'), []
  for mode in modes:
    say(f'trying {mode.name}')
    try:
      trainer = _torch_trainer(params, batch, mode)
      trainer.first_losses = [trainer.step(), trainer.step()]
      seconds = min(seconds_of(trainer.step) for _ in range(2))
    except Exception as error:  # A mode that cannot run here (no compiler) is no contender.
      print(f'{mode.name}: does not run here: {type(error).__name__}')
      continue
    rows.append(
      {
        'contender': f'{mode.name} (trial)',
        'precision': 'bf16' if bfloat16 else 'fp32',
        'batch': len(batch.tokens),
        'tokens_per_s': batch.tokens.size / seconds,
        'ms': seconds * 1e3,
      }
    )
    if seconds < best_seconds:
      best, best_seconds = trainer, seconds
    del trainer
  if best is None:
    raise RuntimeError('torch runs in no mode')
  return best, rows


def _batch_size(params: Any, bfloat16: bool, longest: float) -> int:
  """The usual batch; less where a step in torch would take longer than `longest` seconds."""
  if not bfloat16:
    return BATCH
  mode = TorchMode(attention='sdpa', compiled=False, bfloat16=True)
  trainer = _torch_trainer(params, make_batch(1), mode)
  per_row = min(seconds_of(trainer.step) for _ in range(2))
  return max((size for size in (1, 2, 4, BATCH) if size * per_row <= longest), default=1)


def _torch_trainer(params: Any, batch: Batch, mode: TorchMode) -> TorchTrainer:
  return TorchTrainer(
    CONFIG,
    params,
    np.asarray(batch.tokens),
    np.asarray(batch.targets),
    mode=mode,
    optimizer=TORCH_OPTIMIZER,
    weight_decay=OPTIMIZER.weight_decay,
  )


if __name__ == '__main__':
  main()
