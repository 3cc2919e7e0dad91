"""Lossless self-speculation: tokens/s against full depth, predicted and measured, and transformers.

  python benchmarks/speculative.py [--quick | --full]

Two models of 12 layers and width 384, trained on Python's standard library by the commands in
gin/runs/layerskip_small.gin and gin/runs/plain_small.gin (once; a run that was stopped goes on). The first was made to exit, the second has exits that were never trained:
there the adaptive rule must notice and lose nothing. With --quick missing models are trained for
seconds, and the numbers mean nothing.

Text is held out, decoding is greedy and one request at a time; every speculative text is checked to be
that of full depth. Costs of rounds are measured in this run; a prediction is the formula
(1 - a^(d+1)) / (1 - a) over these costs, with the agreement a of the exit on the generated text.
transformers runs the same weights, exits' norms included, plain and with `assistant_early_exit`.
"""

from __future__ import annotations

import statistics

from assisted_twin import AssistedLlama
from common import Effort, Goal, effort_from_arguments, finish, in_turns, median_ratio, say
from drafting import SIZES, Drafting, Subject
from roofline import rate_measures


def main() -> None:
  """Measures both models and transformers in turns."""
  effort = effort_from_arguments(__doc__)
  size = SIZES[effort]
  kind = 'medium' if effort is Effort.FULL else 'small'
  skipping, plain = (Drafting(f'{name}_{kind}', effort, size) for name in ('layerskip', 'plain'))
  subjects: list[Subject] = [skipping, plain]
  if effort is Effort.FULL:
    subjects.append(Subject(f'shallow_{kind}', effort, size))
  say('transformers')
  theirs = AssistedLlama(skipping.model.config, skipping.loaded.params)
  exits = [None, *(item.layer for item in skipping.model.config.exits)]
  measures = rate_measures()
  for subject in subjects:
    measures |= subject.measures()
  for layer in exits:
    measures[f'transformers {layer}'] = lambda layer=layer: sum(
      theirs.seconds(prompt, size.new_tokens, layer) for prompt in skipping.prompts
    )
  seconds = in_turns(measures, size.repeats)
  rows = [row for subject in subjects for row in subject.rows(seconds)]
  total = size.new_tokens * len(skipping.prompts)
  for layer in exits:
    taken = seconds[f'transformers {layer}']
    rows.append(
      {
        'model': skipping.name,
        'way': f'transformers, {"plain" if layer is None else f"assisted by exit {layer}"}',
        'tokens_per_s': total / statistics.median(taken),
        'speedup': median_ratio(seconds['transformers None'], taken),
      }
    )
  best_theirs = min(
    exits[1:], key=lambda layer: statistics.median(seconds[f'transformers {layer}'])
  )
  best = max(skipping.best, key=lambda index: skipping.predicted(index, skipping.best[index]))
  ways = list(skipping.timers)
  measured = median_ratio(
    seconds[f'{skipping.name}: full'], seconds[f'{skipping.name}: {ways[3 + best]}']
  )
  adaptive = seconds[f'{skipping.name}: adaptive']
  goals = [
    Goal(
      name='lossless_speedup',
      value=median_ratio(seconds[f'{skipping.name}: full'], adaptive),
      op='>=',
      goal=1.8,
    ),
    Goal(
      name='vs_transformers_assisted',
      value=median_ratio(seconds[f'transformers {best_theirs}'], adaptive),
      op='>=',
      goal=1.0,
    ),
    Goal(
      name='prediction_error',
      value=abs(skipping.predicted(best, skipping.best[best]) / measured - 1),
      op='<=',
      goal=0.15,
    ),
    Goal(
      name='worst_case_slowdown',
      value=median_ratio(seconds[f'{plain.name}: adaptive'], seconds[f'{plain.name}: full']),
      op='<=',
      goal=1.05,
    ),
  ]
  finish('speculative', rows, goals)


if __name__ == '__main__':
  main()
