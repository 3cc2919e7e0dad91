"""A training run of seconds: configurations for tests, and a program that trains one of them.

python tiny_run.py MODEL_DIR prints a line when it starts, after each step and around each save, and
`done STEP` at the end. Tests stop it where they like.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

from exitax import checkpoint, data, models, objectives, training

SUBJECTS = ('the old crow', 'a small dog', 'my red cat', 'her loud goose')
VERBS = ('watches', 'follows', 'forgets', 'greets')


def write_text(folder: Path, *, num_files: int = 40) -> Path:
  """Files of sentences in which later words follow from earlier ones; what is there stays."""
  if folder.exists():
    return folder
  folder.mkdir(parents=True)
  rng = random.Random(0)
  for index in range(num_files):
    sentences = []
    for _ in range(8):
      subject, verb = rng.choice(SUBJECTS), rng.choice(VERBS)
      sentences.append(f'{subject} {verb} {rng.choice(SUBJECTS)}, and then {subject} {verb} nobody')
    (folder / f'{index:02}.txt').write_text('. '.join(sentences))
  return folder


MODEL = models.ModelConfig(
  vocab_size=264,
  num_layers=2,
  embed_dim=16,
  num_heads=2,
  mlp_dim=32,
  max_length=64,
  exits=(models.ExitConfig(layer=1),),
)


def make_config(root: Path, **loop: Any) -> training.RunConfig:
  """A run over text below `root`; `loop` are fields of `LoopConfig`."""
  source = data.TextSource((str(write_text(root / 'text')),))
  values = {
    'train_steps': 8,
    'log_period': 2,
    'eval_rows': 8,
    'checkpoint_period': 3,
    **loop,
  }
  return training.RunConfig(
    model=MODEL,
    data=data.DataConfig(
      mixture=data.Task(name='sentences', source=source),
      vocabulary=data.ByteVocabulary(),
      length=32,
      batch_size=8,
      split=data.SplitConfig(fraction=0.2, similarity=1.0),
      cache_dir=str(root / 'cache'),
    ),
    loop=training.LoopConfig(**values),
    objective=objectives.ObjectiveConfig(
      exit_weights=(objectives.ExitWeight(start=0.5, end=0.1, steps=6, curve='linear'),),
      chunk_length=16,
    ),
    optimizer=training.OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    checkpoint=checkpoint.CheckpointConfig(keep_latest=2, best_metric=training.BEST_METRIC),
  )


class _Announcing(training.QuietDisplay):
  """Prints every step, and takes its time so that there is some to be killed in."""

  def advance(self, step: int) -> None:
    print(f'step {step}', flush=True)
    time.sleep(0.03)


def _slow_saves() -> None:
  """Makes a commit last, and says when it is on its way."""
  from exitax.checkpoint import commit

  write_manifest = commit.write_manifest

  def slowly(plan: Any) -> None:
    print(f'saving {plan.step}', flush=True)
    time.sleep(0.3)
    write_manifest(plan)

  commit.write_manifest = slowly


def main() -> None:
  root = Path(sys.argv[1])
  _slow_saves()
  config = make_config(root.parent, train_steps=12)
  print('start', flush=True)
  result = training.train(config, root, display=_Announcing())
  print(f'{"done" if result.finished else "stopped"} {result.step}', flush=True)


if __name__ == '__main__':
  main()
