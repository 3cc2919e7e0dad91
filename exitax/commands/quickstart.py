"""Trains a small early-exit model on real text, evaluates every exit, and writes with it.

  exitax quickstart
  exitax quickstart --model_dir=runs/mine --gin.TRAIN_STEPS=2000

Nothing to download: the text is Python's own standard library. A second run resumes by itself, or
goes straight to the evaluation when training is done.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.console import CommandConsole
from exitax.commands.evaluate import evaluate_directory
from exitax.commands.generate import show
from exitax.commands.train import TrainCommand, launch
from exitax.evaluate import render_report
from exitax.language_model import load
from exitax.training import ConsoleDisplay

RUN_FILE = 'runs/quickstart.gin'
PROMPTS = ('def __init__(self, ', 'import os\n\ndef main(')
# A model of a few minutes is rarely sure: from about here on, depths really vary.
THRESHOLD = 0.2
NEW_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_model_dir(parser, purpose='where files go (runs/quickstart)')
  parser.set_defaults(model_dir='runs/quickstart')
  flag_groups.add_gin_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Trains, evaluates, generates."""
  start = time.perf_counter()
  flag_groups.start_jax(flags)
  flags.gin_file = [RUN_FILE, *flags.gin_file]
  flag_groups.parse_gin(flags, bind_model_dir=True)
  console = CommandConsole()
  model_dir = Path(flags.model_dir)
  _headline(console, f'1. Training into {model_dir}')
  with ConsoleDisplay(console) as display:
    result = launch(gin_config.build(TrainCommand), display)
  if not result.finished:
    console.print(f'stopped at step {result.step}: the same command resumes', markup=False)
    return 0
  _headline(console, '2. Every exit on held-out text')
  report, files = evaluate_directory(model_dir)
  console.print(render_report(report), markup=False)
  _headline(console, f'3. Text, exiting above a confidence of {THRESHOLD}')
  model = load(model_dir)
  for completion in model.generate(PROMPTS, max_new_tokens=NEW_TOKENS, threshold=THRESHOLD):
    show(completion, model.config.depths, console)
    console.print()
  minutes, seconds = divmod(int(time.perf_counter() - start), 60)
  _headline(console, f'Done in {minutes}:{seconds:02d}')
  console.print(
    f'model      {model_dir}/checkpoints\n'
    f'picture    {files.picture}\n'
    f'numbers    {files.json}, {files.csv}\n'
    f'curves     {model_dir}/metrics.jsonl, {model_dir}/tensorboard\n'
    '\n'
    'Try next:\n'
    f"  .venv/bin/exitax generate --model_dir={model_dir} --prompt='class ' --threshold=0.1\n"
    f'  .venv/bin/exitax advise --model_dir={model_dir}\n'
    f'  .venv/bin/exitax serve --model_dir={model_dir}\n'
    f'  .venv/bin/exitax inspect --model_dir={model_dir}\n'
    f'  .venv/bin/exitax train --gin_file=gin/runs/quickstart.gin --model_dir={model_dir} '
    '--gin.TRAIN_STEPS=2000',
    markup=False,
  )
  return 0


def _headline(console: CommandConsole, text: str) -> None:
  console.print()
  console.print(text, style='bold', markup=False)
