"""Scores every exit and 21 exit thresholds of a trained model; writes JSON, CSV and a picture.

  exitax evaluate --model_dir=runs/quickstart
  exitax evaluate --model_dir=runs/quickstart --gin.EvaluateConfig.rows=512

The text is the held-out part of what the model was trained on, as MODEL_DIR/config.gin says; gin
files and bindings come on top of it. Results go to MODEL_DIR/evaluation/.

With --tasks it runs standard benchmarks in place of that, on every exit and at every threshold that is
asked for (lm-evaluation-harness; pip install 'exitax[harness]'):

  exitax evaluate --model_dir=runs/llama --tasks=hellaswag,arc_easy --limit=200
  exitax evaluate --model_dir=runs/llama --tasks=gsm8k --exits=final --thresholds=0.9,0.8
  exitax evaluate --model_dir=runs/llama --tasks=mine --task_path=tasks

With --task it lets groups of thinkers work on a task with exact scores (Group Think), and compares what they cover
with chain of thought and, with --baselines, with independent sampling, by tokens of each, tokens of all, and time:

  exitax evaluate --model_dir=runs/group_think --task=enumeration --baselines
  exitax evaluate --model_dir=runs/group_paths --task=floyd_warshall --thinkers=4 --prompts=100
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from exitax.checkpoint import CheckpointError, load_model, read_model
from exitax.commands import benchmarks, gin_config, group_tasks
from exitax.commands import flags as flag_groups
from exitax.commands.train import CONFIG_FILE
from exitax.data import DataConfig, build_data, progress_bar
from exitax.errors import UserError
from exitax.evaluate import (
  EvaluateConfig,
  EvaluationReport,
  ReportFiles,
  evaluate,
  render_report,
  write_report,
)
from exitax.parallel import MeshConfig, ShardingRules, make_mesh, use

EVALUATION_FOLDER = 'evaluation'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_model_dir(parser, purpose='the model: what `exitax train` wrote')
  parser.add_argument('--step', type=int, help='which checkpoint (the latest by default)')
  parser.add_argument('--output', metavar='DIR', help='where results go (MODEL_DIR/evaluation)')
  benchmarks.add_arguments(parser)
  group_tasks.add_arguments(parser)
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Evaluates."""
  flag_groups.start_jax(flags)
  if not flags.model_dir:
    raise UserError('evaluate needs a model: --model_dir=DIR, such as runs/quickstart')
  model_dir = Path(flags.model_dir)
  read_model(model_dir)  # Says what is wrong with a directory that holds no model.
  output = flags.output or model_dir / EVALUATION_FOLDER
  groups, tasks = group_tasks.asked_for(flags), benchmarks.asked_for(flags)
  if groups and tasks:
    raise UserError('--task is for groups of thinkers, --tasks for benchmarks: give one of them')
  if groups:
    return group_tasks.run(flags, text=training_config(model_dir), output=output)
  if tasks:
    return benchmarks.run(flags, output=output)
  flag_groups.parse_gin(flags, text=training_config(model_dir), bind_model_dir=False)
  report, files = evaluate_directory(model_dir, step=flags.step, output=output)
  print(render_report(report))
  print(f'\nwritten: {files.picture}, {files.csv}, {files.json}')
  return 0


def evaluate_directory(
  model_dir: Path, *, step: int | None = None, output: str | os.PathLike[str] | None = None
) -> tuple[EvaluationReport, ReportFiles]:
  """Evaluates the model of a directory with what gin binds, and writes the results."""
  folder = flag_groups.make_folder(output or model_dir / EVALUATION_FOLDER, name='output')
  config = gin_config.build(EvaluateConfig)
  rules = gin_config.build(ShardingRules)
  mesh = make_mesh(gin_config.build(MeshConfig))
  loaded = load_model(model_dir, mesh=mesh, rules=rules, step=step)
  data = build_data(gin_config.build(DataConfig), tokenizer=loaded.tokenizer)
  with use(mesh, rules):
    report = evaluate(loaded, data, config, progress=progress_bar)
  return report, write_report(report, folder)


def training_config(model_dir: Path) -> str:
  """What was in force when the model was trained, as gin: the text that commands score it on."""
  try:
    return (model_dir / CONFIG_FILE).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise CheckpointError(
      f'{model_dir / CONFIG_FILE} cannot be read: it names the text to evaluate on ({error})'
    ) from None
