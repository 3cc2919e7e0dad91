"""Who answered a roll-call, and what is wrong with it: pure functions of what processes say."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A configuration is read by people, so it is small; what is beyond counts by its digest only.
MAX_CONFIGURATION = 1 << 18
_MAX_SHOWN = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """What one process says of itself.

  Attributes:
    process_id: its number.
    num_processes: how many it was told there are.
    host: name of its host.
    configuration: lines 'name = value' that must be the same in all processes.
    digest: SHA-256 (hex) of all lines.
  """

  process_id: int
  num_processes: int
  host: str
  configuration: tuple[str, ...]
  digest: str

  @property
  def name(self) -> str:
    """'process 1 (host)'."""
    return f'process {self.process_id} ({self.host})'


def make_entry(
  *, process_id: int, num_processes: int, host: str, configuration: Sequence[str]
) -> Entry:
  """An entry whose lines are cut to `MAX_CONFIGURATION` characters; its digest is of all."""
  kept, size = [], 0
  for line in configuration:
    size += len(line)
    if size > MAX_CONFIGURATION:
      break
    kept.append(line)
  return Entry(
    process_id=process_id,
    num_processes=num_processes,
    host=host,
    configuration=tuple(kept),
    digest=hashlib.sha256('\n'.join(configuration).encode()).hexdigest(),
  )


def encode_entry(entry: Entry) -> bytes:
  """The entry as JSON."""
  return json.dumps(dataclasses.asdict(entry)).encode()


def decode_entry(content: bytes) -> Entry | None:
  """The entry that `encode_entry` made, or None if this is anything else."""
  try:
    value = json.loads(content)
    entry = Entry(**{**value, 'configuration': tuple(value['configuration'])})
  except (ValueError, TypeError, KeyError, RecursionError):
    return None
  numbers = (entry.process_id, entry.num_processes)
  texts: tuple[Any, ...] = (entry.host, entry.digest, *entry.configuration)
  fits = all(type(n) is int and n >= 0 for n in numbers) and all(isinstance(t, str) for t in texts)
  # It comes from the network and goes to a terminal.
  return dataclasses.replace(entry, host=_printable(entry.host)) if fits else None


def problem_with(entries: Sequence[Entry], *, address: str, seconds: float) -> str | None:
  """What is wrong, as one line that is true in every process; None if all is well.

  Args:
    entries: what was heard, process 0 among them.
    address: where the roll-call was held.
    seconds: how long it lasted at most.
  """
  first, *others = entries = sorted(entries, key=lambda entry: entry.process_id)
  for other in others:
    if other.num_processes != first.num_processes:
      return (
        f'{other.name} was started with num_processes={other.num_processes}, {first.name} with '
        f'{first.num_processes}: start all of them with the same number'
      )
  return (
    _doubles(entries) or _missing(entries, address=address, seconds=seconds) or _differing(entries)
  )


def _doubles(entries: Sequence[Entry]) -> str | None:
  counts = collections.Counter(entry.process_id for entry in entries)
  for number, count in counts.items():
    if count > 1:
      hosts = ' and '.join(entry.host for entry in entries if entry.process_id == number)
      return (
        f'process_id={number} was given to {count} processes, on {hosts}: give each its own, '
        f'0 to {entries[0].num_processes - 1}'
      )
  return None


def _missing(entries: Sequence[Entry], *, address: str, seconds: float) -> str | None:
  total = entries[0].num_processes
  absent = sorted(set(range(total)) - {entry.process_id for entry in entries})
  if not absent:
    return None
  return (
    f'of {total} processes, process {_ranges(absent)} did not come to {address} within '
    f'{seconds:g} s; present: {", ".join(f"{e.process_id} ({e.host})" for e in entries[:20])}'
    f'{" and others" if len(entries) > 20 else ""}: see whether the missing started, with the same '
    'coordinator address'
  )


def _differing(entries: Sequence[Entry]) -> str | None:
  first, *others = entries
  odd = [entry for entry in others if entry.digest != first.digest]
  if not odd:
    return None
  lines = _differences(first.configuration, odd[0].configuration)
  shown = [
    f'{name} is {_cut(there, here)} on {odd[0].name} and {_cut(here, there)} on {first.name}'
    for name, here, there in lines[:3]
  ] or ['lines beyond those compared']
  more = f'; {len(lines) - 3} more lines differ' if len(lines) > 3 else ''
  also = f'; process {_ranges(e.process_id for e in odd[1:])} differ too' if odd[1:] else ''
  return (
    f'processes are configured differently: {", ".join(shown)}{more}{also}: start all with the '
    'same flags, gin files and releases'
  )


def _differences(here: Sequence[str], there: Sequence[str]) -> list[tuple[str, str, str]]:
  """(name, value here, value there) of every line that differs."""
  ours, theirs = _by_name(here), _by_name(there)
  absent = 'not set'
  return [
    (_printable(name), ours.get(name, absent), theirs.get(name, absent))
    for name in {**ours, **theirs}
    if ours.get(name) != theirs.get(name)
  ]


def _by_name(lines: Iterable[str]) -> Mapping[str, str]:
  parts = (line.partition(' = ') for line in lines)
  return {name: value for name, _, value in parts}


def _cut(value: str, other: str) -> str:
  """The part of a long value where it differs from the other."""
  value = _printable(value, limit=len(value))
  if len(value) <= _MAX_SHOWN:
    return value
  same = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), 0)
  start = max(0, same - _MAX_SHOWN // 4)
  return f'{"..." if start else ""}{value[start : start + _MAX_SHOWN]}...'


def _printable(text: str, *, limit: int = 200) -> str:
  return ''.join(char if char.isprintable() else '?' for char in text[:limit])


def _ranges(numbers: Iterable[int]) -> str:
  """`[1, 2, 3, 7]` -> '1-3, 7'."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)
