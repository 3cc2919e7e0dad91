"""What thinkers that see each other cover: Group Think beside its baselines, on two tasks with exact scores.

  python benchmarks/group_think_quality.py [--quick | --full]

Models of gin/runs/group_think.gin (lists of 32 items; --full: group_think_long.gin, 64) and gin/runs/group_paths.gin
(all shortest paths of 4 nodes) are taken from runs/, or trained there first, with the tasks and slots of these files. Three seeds of 200
problems, temperature 1, all ways on the same problems with the same names and slots. Independent texts are beside their theory,
1 - (1 - K/L)^N, which no thinkers exceed that choose in the same way: a baseline far below it would be unfair. Group Think is beside the policy that
chooses at random among all items that nobody is seen to have written, simulated; it still collides within a step.
Files and pictures as of `exitax evaluate --task` go to the models' evaluation/.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from common import Effort, Goal, effort_from_arguments, finish, say
from trained import parse_training, trained

from exitax.commands import gin_config
from exitax.commands.group_tasks import trained_task
from exitax.data import GroupDataConfig
from exitax.evaluate.groups import (
  CHAIN,
  GROUP,
  INDEPENDENT,
  LAG,
  MASK_OFF,
  Curve,
  GroupEvaluateConfig,
  GroupReport,
  at_equal_tokens,
  evaluate_groups,
  render_groups,
  write_group_report,
)
from exitax.parallel import MeshConfig, ShardingRules, make_mesh, use

REACH = 0.9  # Of the entries of a table of distances.
FW_THINKERS = 4


def main() -> None:
  """Measures both tasks, and prints tables and one JSON object."""
  effort = effort_from_arguments(__doc__)
  lists_run = 'group_think_long' if effort is Effort.FULL else 'group_think'
  sizes = GroupEvaluateConfig(thinkers=(2, 4, 8), baselines=True)
  if effort is Effort.QUICK:
    sizes = dataclasses.replace(sizes, prompts=8, seeds=1, speed_repeats=2)
  lists = _measure(lists_run, 'enumeration', sizes, effort)
  sizes = dataclasses.replace(sizes, thinkers=(2, FW_THINKERS), lags=(4, 16), tokens=112)
  paths = _measure('group_paths', 'floyd_warshall', sizes, effort)
  goals = [
    Goal(name='independent_theory_error', value=_theory_error(lists), op='<=', goal=0.02),
    *(
      Goal(name=f'gain_of_ideal_n{size}', value=_gain_of_ideal(lists, size), op='>=', goal=0.8)
      for size in (4, 8)
    ),
    Goal(name='fw_latency_ratio', value=_latency_ratio(paths), op='<=', goal=0.5),
    Goal(name='fw_equal_tokens_gain', value=_equal_tokens_gain(paths), op='>=', goal=0.0),
  ]
  rows = [_row(report, curve) for report in (lists, paths) for curve in report.curves]
  finish('group_think_quality', rows, goals)


def _measure(run: str, task: str, config: GroupEvaluateConfig, effort: Effort) -> GroupReport:
  """All ways on a task of a run's training, with its slots."""
  loaded = trained(run, effort)
  parse_training(loaded)
  data = gin_config.build(GroupDataConfig)
  say(f'{task}: {config.prompts * config.seeds} problems')
  mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingRules()
  with use(mesh, rules):
    report = evaluate_groups(loaded, trained_task(task, data), data.mix, config, mesh=mesh)
  folder = loaded.directory / 'evaluation'
  folder.mkdir(exist_ok=True)
  write_group_report(report, folder)
  print(render_groups(report), end='\n\n')
  return report


def _theory_error(report: GroupReport) -> float:
  """The largest difference of independent texts from their theory, at any length and size."""
  differences = [
    abs(found - expected)
    for size in report.sizes
    for curve in [report.curve(INDEPENDENT, size)]
    for found, expected in zip(curve.coverage, curve.theory or (), strict=True)
  ]
  return max(differences)


def _gain_of_ideal(report: GroupReport, size: int) -> float:
  """Gain over independent texts, as a share of the ideal policy's over their theory, at K = L / N."""
  group, apart = report.curve(GROUP, size), report.curve(INDEPENDENT, size)
  at = group.fair_share
  assert group.theory is not None and apart.theory is not None
  return (group.coverage[at] - apart.coverage[at]) / (group.theory[at] - apart.theory[at])


def _latency_ratio(report: GroupReport) -> float | None:
  """Tokens of each thinker to 90 %, over those of a chain of thought; None if either never gets there."""
  ours = report.curve(GROUP, FW_THINKERS).tokens_to[str(REACH)]
  chain = report.curve(CHAIN, 1).tokens_to[str(REACH)]
  return None if ours is None or chain is None else ours / chain


def _equal_tokens_gain(report: GroupReport) -> float | None:
  """Coverage over the best independent sampling of two or more texts with as many tokens in all, at 90 %."""
  group = report.curve(GROUP, FW_THINKERS)
  reach = group.tokens_to[str(REACH)]
  if reach is None:
    return None
  total = group.total_tokens[reach]
  others = [report.curve(INDEPENDENT, size) for size in report.sizes]
  return group.coverage[reach] - max(
    at_equal_tokens(curve.coverage, curve.total_tokens, total) for curve in others
  )


def _row(report: GroupReport, curve: Curve) -> dict[str, Any]:
  at = min(curve.fair_share, report.tokens)
  reach = curve.tokens_to[str(REACH)]
  never = curve.way in (INDEPENDENT, MASK_OFF)
  return {
    'task': report.task,
    'way': curve.way,
    'thinkers': curve.thinkers,
    'lag': 'never' if never else (curve.lag if curve.way in (LAG, GROUP) else ''),
    'tokens_each': at,
    'coverage': curve.coverage[at],
    'low': curve.low[at],
    'high': curve.high[at],
    'repeated': curve.duplicate_share,
    'tokens_to_90': '' if reach is None else reach,
    'all_tokens_to_90': '' if reach is None else curve.total_tokens[reach],
    'step_ms': curve.step_ms,
  }


if __name__ == '__main__':
  main()
