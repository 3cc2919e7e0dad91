"""What early exits cost in training: step time and peak temporary memory, over a model without.

  python benchmarks/exit_overhead.py [--quick | --full]

The 27.8M Llama shape with exits (an own norm, then the tied vocabulary matrix) after 1/4 and 1/2 of
the layers. Such an exit must add three products with the vocabulary matrix: logits, d_features and
d_matrix. The ratio of step times is divided by the ratio of flops that this makes unavoidable; memory is what the
compiled step allocates beside its arguments and results, which would grow by the logits of every exit if they
all lived at once.
"""

from __future__ import annotations

import dataclasses
import statistics

import jax
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
from our_step import BATCH, CONFIG, LENGTH, OurTrainer, make_batch

from exitax.models import ExitConfig, ExitLM, ModelConfig

WITH_EXITS = dataclasses.replace(
  CONFIG,
  exits=tuple(ExitConfig(layer=CONFIG.num_layers // share) for share in (4, 2)),
)


def main() -> None:
  """Measures both models in turns and prints table, goals and JSON."""
  effort = effort_from_arguments(__doc__)
  repeats = {Effort.QUICK: 3, Effort.NORMAL: 15, Effort.FULL: 31}[effort]
  trainers = {}
  for name, config in (('no exits', CONFIG), ('exits at 1/4 and 1/2', WITH_EXITS)):
    say(f'compiling: {name}')
    params = ExitLM(config).init(jax.random.key(0))
    trainers[name] = OurTrainer(config, params, make_batch(BATCH))
  for trainer in trainers.values():
    trainer.step()
  seconds = in_turns(
    {name: lambda trainer=trainer: seconds_of(trainer.step) for name, trainer in trainers.items()},
    repeats,
  )
  rows = [
    {
      'model': name,
      'ms': statistics.median(seconds[name]) * 1e3,
      'gflop': step_flops(trainer.config) / 1e9,
      'temporary_mb': trainer.temporary_bytes / 1e6,
      'compile_s': trainer.compile_seconds,
      'repeats': repeats,
    }
    for name, trainer in trainers.items()
  ]
  plain, exits = trainers
  time_ratio = median_ratio(seconds[exits], seconds[plain])
  flops_ratio = step_flops(WITH_EXITS) / step_flops(CONFIG)
  memory_ratio = trainers[exits].temporary_bytes / trainers[plain].temporary_bytes
  print(f'step time x{time_ratio:.3f}, flops x{flops_ratio:.3f}, memory x{memory_ratio:.3f}')
  finish(
    'exit_overhead',
    rows,
    [
      Goal(name='time_over_flops_ratio', value=time_ratio / flops_ratio, op='<=', goal=1.05),
      Goal(name='memory_ratio', value=memory_ratio, op='<=', goal=1.10),
    ],
  )


def step_flops(config: ModelConfig) -> float:
  """Of the products that a step must do: three per weight, three per exit's vocabulary matrix.

  Attention counts the half that causality leaves; norms, softmax and the optimizer are left out,
  so the exits' share is not made to look larger than it is.
  """
  cfg, tokens = config, BATCH * LENGTH
  heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  weights = cfg.embed_dim * (2 * heads + 2 * kv_heads + 3 * cfg.mlp_dim)
  attention = 2 * heads * LENGTH / 2
  vocabulary = len(cfg.depths) * cfg.vocab_size * cfg.embed_dim
  return 6.0 * tokens * (cfg.num_layers * (weights + attention) + vocabulary)


if __name__ == '__main__':
  main()
