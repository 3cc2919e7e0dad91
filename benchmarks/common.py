"""What every benchmark shares: arguments, timing in turns, the machine, goals, the last line.

Contenders are measured in turns and compared by medians, so that a machine that grows slow for a
while slows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Threads of the library that ran before spin for a moment; they must not slow the next one.
SETTLE_SECONDS = 0.25


class Effort(enum.Enum):
  """How long a benchmark may take."""

  QUICK = 'quick'  # A minute or two, to see that it works.
  NORMAL = 'normal'  # Up to 30 minutes on 2 cores.
  FULL = 'full'  # As long as it takes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
  """A number with a bound that it should meet.

  Attributes:
    name: what it is called in the JSON and on the results page.
    value: as measured; None where this machine cannot measure it.
    op: `>=` or `<=`.
    goal: the bound.
  """

  name: str
  value: float | None
  op: str
  goal: float

  @property
  def met(self) -> bool | None:
    """Whether the value is on the right side of the goal; None if not measured."""
    if self.value is None:
      return None
    return bool(self.value >= self.goal if self.op == '>=' else self.value <= self.goal)


def effort_from_arguments(description: str | None) -> Effort:
  """Reads `--quick` and `--full` from the command line; `description` is a module's docstring."""
  parser = argparse.ArgumentParser(description=(description or '').partition('\n')[0])
  group = parser.add_mutually_exclusive_group()
  group.add_argument('--quick', action='store_true', help='a minute or two, rough numbers')
  group.add_argument('--full', action='store_true', help='all cases, however long they take')
  arguments = parser.parse_args()
  if arguments.quick:
    return Effort.QUICK
  return Effort.FULL if arguments.full else Effort.NORMAL


def say(what: str) -> None:
  """Tells a waiting person, on stderr, what is going on."""
  print(f'[{time.strftime("%H:%M:%S")}] {what}', file=sys.stderr, flush=True)


def seconds_of(act: Callable[[], Any]) -> float:
  """Wall-clock seconds of one call."""
  start = time.perf_counter()
  act()
  return time.perf_counter() - start


def in_turns(measures: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
  """Seconds of every repeat of every measure, one of each per round.

  Args:
    measures: functions that run something once and return the seconds that count.
    repeats: rounds.
  """
  seconds: dict[str, list[float]] = {name: [] for name in measures}
  for number in range(repeats):
    say(f'round {number + 1} of {repeats}: {", ".join(measures)}')
    for name, measure in measures.items():
      time.sleep(SETTLE_SECONDS)
      seconds[name].append(measure())
  return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
  """Median over rounds of the ratio within a round: what slows a whole round cancels."""
  return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def commit() -> str:
  """The checkout's commit, with `+` if tracked files differ from it; empty outside git."""
  root = str(Path(__file__).resolve().parent.parent)

  def git(*arguments: str) -> str:
    command = ['git', '-C', root, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

  changed = git('status', '--porcelain', '--untracked-files=no')
  return git('rev-parse', '--short', 'HEAD') + ('+' if changed else '')


def machine() -> dict[str, Any]:
  """The processor, its cores and vector instructions, and the versions of the libraries."""
  return {
    'processor': _cpu_field('model name') or platform.machine(),
    'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
    'instructions': [
      flag
      for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')
      if flag in _cpu_field('flags').split()
    ],
    'system': platform.platform(),
    'python': platform.python_version(),
    **{name: _version(name) for name in ('jax', 'jaxlib', 'flax', 'torch', 'transformers')},
  }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints rows under the names of their columns; a row without a value leaves it blank."""
  if not rows:
    return
  columns = list(dict.fromkeys(name for row in rows for name in row))
  cells = [columns, *([_cell(row.get(name, '')) for name in columns] for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  for line in cells:
    first, *rest = (text.ljust(width) for text, width in zip(line, widths, strict=True))
    print(
      '  '.join([first, *(text.strip().rjust(w) for text, w in zip(rest, widths[1:], strict=True))])
    )


def finish(name: str, rows: Sequence[Mapping[str, Any]], goals: Sequence[Goal]) -> None:
  """Prints the table, the goals, met or missed, and as last line the JSON object."""
  print_table(rows)
  for goal in goals:
    bound = f'(goal {goal.op} {goal.goal})'
    if goal.value is None:
      print(f'{goal.name}: not measured {bound}')
    else:
      print(f'{goal.name}: {goal.value:.4g} {bound}: {"met" if goal.met else "MISSED"}')
  report = {
    'benchmark': name,
    'commit': commit(),
    'machine': machine(),
    'rows': list(rows),
    'goals': [{**dataclasses.asdict(goal), 'met': goal.met} for goal in goals],
  }
  print(json.dumps(report), flush=True)


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.3g}'
  return str(value)


def _cpu_field(name: str) -> str:
  try:
    lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    return ''
  return next((line.partition(':')[2].strip() for line in lines if line.startswith(name)), '')


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
