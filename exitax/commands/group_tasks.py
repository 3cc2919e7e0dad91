"""The part of `exitax evaluate` that runs tasks for groups of thinkers: its flags, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from exitax.checkpoint import load_model
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.data import GroupDataConfig, find_group_task, progress_bar
from exitax.data.group_tasks import Task
from exitax.errors import UserError
from exitax.evaluate.groups import (
  GroupEvaluateConfig,
  evaluate_groups,
  render_groups,
  write_group_report,
)
from exitax.parallel import MeshConfig, ShardingRules, make_mesh, use

gin_config.make_configurable(GroupEvaluateConfig)

# They mean something for groups alone.
_OWN_FLAGS = ('baselines', 'thinkers', 'prompts', 'tokens')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of tasks for groups."""
  group = parser.add_argument_group('tasks for groups of thinkers')
  group.add_argument(
    '--task',
    metavar='NAMES',
    help='enumeration, floyd_warshall, tree_sum or template; several with commas',
  )
  group.add_argument(
    '--baselines',
    action='store_true',
    default=None,
    help='independent texts, the group with its cross-mask off and seeing late, too',
  )
  group.add_argument(
    '--thinkers', type=_sizes, metavar='N', help='sizes of groups, such as 2,4 (4,8)'
  )
  group.add_argument('--prompts', type=int, metavar='N', help='problems per seed (200)')
  group.add_argument('--tokens', type=int, metavar='N', help='of each thinker (what a slot holds)')


def asked_for(flags: argparse.Namespace) -> bool:
  """Whether the command line asks for tasks for groups.

  Raises:
    UserError: it has their flags, and no task.
  """
  return flag_groups.asks_for(flags, 'task', _OWN_FLAGS, part='groups of thinkers')


def run(flags: argparse.Namespace, *, text: str, output: str | Path) -> int:
  """Measures groups of the model of `flags.model_dir`, prints tables, writes files to `output`.

  Args:
    flags: the command line.
    text: what was in force when the model was trained, as gin.
    output: a folder.
  """
  # For a model that was not trained in groups, whose configuration does not speak of them.
  mix = 'GroupDataConfig.mix = @GroupMix()\n'
  flag_groups.parse_gin(flags, text=mix + text, bind_model_dir=False)
  config = flag_groups.override(gin_config.build(GroupEvaluateConfig), flags)
  data = gin_config.build(GroupDataConfig)
  tasks = [trained_task(name.strip(), data) for name in flags.task.split(',')]
  folder = flag_groups.make_folder(output, name='output')
  mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingRules()
  loaded = load_model(flags.model_dir, mesh=mesh, rules=rules, step=flags.step)
  for task in tasks:
    with use(mesh, rules):
      report = evaluate_groups(loaded, task, data.mix, config, mesh=mesh, progress=progress_bar)
    files = write_group_report(report, folder)
    print(render_groups(report))
    print(f'\nwritten: {files.picture}, {files.csv}, {files.json}', flush=True)
  return 0


def trained_task(name: str, data: GroupDataConfig) -> Task:
  """The task of the name that the model was trained on (of several, the last), or else the usual one."""
  own = {task.name: task for task in map(find_group_task, data.tasks)}
  return own.get(name) or find_group_task(name)


def _sizes(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(part) for part in text.split(','))
  except ValueError:
    raise UserError(f'--thinkers={text} are not numbers with commas, such as 2,4') from None
