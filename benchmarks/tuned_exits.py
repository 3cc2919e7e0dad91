"""One model, given exits in two ways: EE-Tuning and LayerSkip. Losses, agreement, speed-ups.

  python benchmarks/tuned_exits.py [--quick | --full]

The model of gin/runs/plain_small.gin, whose exits were given no weight, is trained by that command if it is
missing. gin/runs/ee_tune_small.gin tunes heads on it frozen (its final layer stays what it was, bit for bit);
gin/runs/layerskip_tune_small.gin trains all of it on, for as many steps, with layers dropped and losses at
exits. Each is then decoded by speculation, with drafts from every exit and as the adaptive rule chooses,
beside its own full depth, on held-out text, greedily, one request at a time; every text is checked to be that
of full depth. With --quick missing models are trained for seconds, and the numbers mean nothing.
"""

from __future__ import annotations

from typing import Any

from common import effort_from_arguments, finish, in_turns
from drafting import SIZES, Drafting
from roofline import rate_measures
from trained import data_of

from exitax.evaluate import EvaluateConfig, evaluate

ROWS = 64  # Of held-out text that is scored.
NAMES = ('plain_small', 'ee_tune_small', 'layerskip_tune_small')


def main() -> None:
  """Trains what is missing, decodes all models in turns, prints a table and one JSON object."""
  effort = effort_from_arguments(__doc__)
  size = SIZES[effort]
  subjects = [Drafting(name, effort, size) for name in NAMES]
  measures = rate_measures()
  for subject in subjects:
    measures |= subject.measures()
  seconds = in_turns(measures, size.repeats)
  rows = [row for subject in subjects for row in _exits(subject) + subject.rows(seconds)]
  finish('tuned_exits', rows, [])


def _exits(subject: Drafting) -> list[dict[str, Any]]:
  """What each exit predicts: its loss on held-out text, and how often it agrees with the final layer."""
  report = evaluate(
    subject.loaded, data_of(subject.loaded), EvaluateConfig(rows=ROWS, speed_prompts=0)
  )
  return [
    {
      'model': subject.name,
      'way': name,
      'held_out_nll': score.nll,
      'agreement': agreement,
    }
    for name, score, agreement in zip(
      subject.model.config.depth_names, report.exits, report.exit_agreement, strict=True
    )
  ]


if __name__ == '__main__':
  main()
