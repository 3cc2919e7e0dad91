"""The part of `exitax evaluate` that runs standard benchmarks: its flags, and what it prints."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from exitax.checkpoint import load_model, read_model, tokenizer_directory
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.data import progress_bar
from exitax.errors import UserError
from exitax.evaluate.harness import (
  ChatFn,
  TaskConfig,
  make_rows,
  open_tasks,
  render_task_report,
  run_tasks,
  write_task_report,
)
from exitax.evaluate.harness.library import check_library
from exitax.parallel import MeshConfig, ShardingRules, make_mesh

# They mean something for tasks alone.
_OWN_FLAGS = (
  *('task_path', 'limit', 'num_fewshot', 'exits', 'thresholds', 'confidence', 'strategy'),
  *('batch_size', 'apply_chat_template'),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of benchmarks."""
  group = parser.add_argument_group('standard benchmarks')
  group.add_argument(
    '--tasks',
    metavar='NAMES',
    help='tasks, groups or tags of lm-evaluation-harness with commas between them; * is anything',
  )
  group.add_argument('--task_path', metavar='DIR', help='a folder with YAML tasks of your own')
  group.add_argument('--limit', type=int, metavar='N', help='documents per task at most')
  group.add_argument(
    '--num_fewshot', type=int, metavar='N', help='solved examples before each question'
  )
  group.add_argument(
    '--exits', metavar='LAYERS', help='rows of exits: all (the default), or such as 2,4,final'
  )
  group.add_argument(
    '--thresholds', metavar='T', help='rows of thresholds, such as 0.9,0.8; none by default'
  )
  group.add_argument(
    '--confidence',
    metavar='NAME',
    help='compared with thresholds: max_prob (the default), margin or entropy',
  )
  group.add_argument(
    '--strategy',
    metavar='NAME',
    help='how the final layer writes: full (the default) or speculative, which writes the same',
  )
  group.add_argument('--batch_size', type=int, metavar='N', help='texts at once (16)')
  group.add_argument(
    '--apply_chat_template',
    action='store_true',
    default=None,
    help="put questions as a chat, in the tokenizer's own template",
  )


def asked_for(flags: argparse.Namespace) -> bool:
  """Whether the command line asks for benchmarks.

  Raises:
    UserError: it has their flags, and no tasks.
  """
  return flag_groups.asks_for(flags, 'tasks', _OWN_FLAGS, part='benchmarks')


def run(flags: argparse.Namespace, *, output: str | Path) -> int:
  """Runs benchmarks on the model of `flags.model_dir`, prints a table, writes files to `output`."""
  check_library()
  # One device unless told otherwise: texts that are written do not spread over the data axis.
  flag_groups.parse_gin(flags, text='MeshConfig.data = 1', bind_model_dir=False)
  settings = _settings(flags)
  config, _ = read_model(flags.model_dir)
  rows = make_rows(
    config,
    exits=flags.exits or 'all',
    thresholds=_thresholds(flags.thresholds),
    confidence=flags.confidence or 'max_prob',
    strategy=flags.strategy or 'full',
  )
  folder = flag_groups.make_folder(output, name='output')
  _quieten_bars()
  tasks = open_tasks(settings, progress=progress_bar)
  mesh, rules = _mesh(), gin_config.build(ShardingRules)
  loaded = load_model(flags.model_dir, mesh=mesh, rules=rules, step=flags.step)
  report = run_tasks(
    loaded,
    tasks,
    rows,
    mesh=mesh,
    rules=rules,
    chat=_chat(flags.model_dir) if flags.apply_chat_template else None,
    progress=progress_bar,
  )
  files = write_task_report(report, folder)
  print(render_task_report(report))
  print(f'\nwritten: {files.csv}, {files.json}')
  return 0


def _settings(flags: argparse.Namespace) -> TaskConfig:
  names = ('task_path', 'limit', 'num_fewshot', 'batch_size')
  given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
  return TaskConfig(tasks=tuple(name.strip() for name in flags.tasks.split(',')), **given)


def _thresholds(text: str | None) -> tuple[float, ...]:
  try:
    return tuple(float(part) for part in text.split(',')) if text else ()
  except ValueError:
    raise UserError(f'--thresholds={text} are not numbers with commas between them') from None


def _mesh() -> Mesh:
  config = gin_config.build(MeshConfig)
  size = math.prod(config.sizes.values())
  # A size of -1 takes all that are left.
  return make_mesh(config, jax.devices()[:size] if size > 0 else None)


def _chat(model_dir: str) -> ChatFn:
  """Renders messages in the template of a model's tokenizer.

  Raises:
    UserError: it has none.
  """
  from exitax.serve.chat import PLAIN_STOPS, load_chat_template
  from exitax.serve.refusals import Refusal

  template = load_chat_template(None, tokenizer_folder=tokenizer_directory(model_dir))
  if template.stops == PLAIN_STOPS:
    raise UserError(
      f'{model_dir} has no chat template: leave --apply_chat_template out, or convert the model from a '
      'folder that has one'
    )

  def render(messages: Sequence[Mapping[str, Any]]) -> str:
    try:
      return template.render(messages)
    except Refusal as refusal:
      raise UserError(refusal.message) from None

  return render


def _quieten_bars() -> None:
  """The libraries draw their bars into files too: as ours, only where a person looks."""
  if not sys.stderr.isatty():
    for name in ('TQDM_DISABLE', 'HF_DATASETS_DISABLE_PROGRESS_BARS'):
      os.environ.setdefault(name, '1')
