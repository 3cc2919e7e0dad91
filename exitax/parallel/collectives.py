"""Collectives of a compiled program: what one device sends in one call, loops multiplied out.

A sharded program gets most of its collectives from the compiler, so they are read from the compiled
text (HLO). Bytes are those that a ring moves: each of n devices sends (n - 1) / n of the whole for a
gather or a scatter, twice that for an all-reduce.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_WIDTHS = {'pred': 8, 'bf16': 16, 'token': 0, 'c64': 64, 'c128': 128}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r' ([a-z][\w\-]*)\(')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes over which the devices of a group differ; empty if they fit none.
    count: how often one device takes part, in one call of the program.
    bytes_sent: what one device sends in all of them.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  bytes_sent: int


def collectives_in(text: str, mesh: Mesh) -> tuple[Collective, ...]:
  """Collectives of `compiled.as_text()`, most bytes first.

  Of a conditional the branch that sends most counts. A loop whose number of trips the text does not
  tell counts once.

  Args:
    text: a compiled, partitioned module.
    mesh: the mesh that it was compiled for.
  """
  counts, sent = _Module(text, mesh).entry()
  found = [Collective(kind, axes, counts[kind, axes], sent[kind, axes]) for kind, axes in counts]
  return tuple(sorted(found, key=lambda item: (-item.bytes_sent, item.kind, item.axes)))


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line: name, type of the result, operation, and the rest of the line."""

  name: str
  type: str
  opcode: str
  rest: str


_Totals = tuple[Counter[tuple[str, tuple[str, ...]]], Counter[tuple[str, tuple[str, ...]]]]


class _Module:
  """A parsed module."""

  def __init__(self, text: str, mesh: Mesh) -> None:
    self._mesh = mesh
    self._computations: dict[str, list[_Instruction]] = {}
    self._entry = ''
    current: list[_Instruction] = []
    for line in text.splitlines():
      if match := _COMPUTATION.match(line):
        current = self._computations.setdefault(match.group(2), [])
        if match.group(1):
          self._entry = match.group(2)
      elif (match := _INSTRUCTION.match(line)) and (parsed := _parse(*match.group(2, 3))):
        current.append(parsed)

  def entry(self) -> _Totals:
    return self._cost(self._entry)

  @functools.cache  # noqa: B019  (a module lives as long as one call of `collectives_in`)
  def _cost(self, name: str) -> _Totals:
    total: _Totals = (Counter(), Counter())
    seen: set[str] = set()
    for instruction in self._with_fused(name):
      kind = instruction.opcode.removesuffix('-start')
      if kind in KINDS:
        # Fused pieces of one asynchronous collective (start, overlapped work, end) name one chain.
        chain = _attribute(instruction.rest, r'chain_id="(\d+)"') or instruction.name
        if chain not in seen:
          seen.add(chain)
          _add(total, self._price(kind, instruction), 1)
      elif instruction.opcode == 'while':
        body = _attribute(instruction.rest, r'body=%?([\w.\-]+)')
        _add(total, self._cost(body), self._trips(instruction))
      elif instruction.opcode == 'conditional':
        branches = [self._cost(branch) for branch in _branches(instruction.rest)]
        _add(total, max(branches, key=lambda cost: cost[1].total()), 1)
      elif instruction.opcode in ('call', 'async-start'):
        called = _attribute(instruction.rest, r'(?:to_apply|calls)=%?([\w.\-]+)')
        _add(total, self._cost(called), 1)
    return total

  def _with_fused(self, name: str) -> Iterable[_Instruction]:
    """A computation's instructions and those of fusions in it: the TPU fuses collectives."""
    for instruction in self._computations.get(name, ()):
      yield instruction
      if instruction.opcode == 'fusion':
        called = _attribute(instruction.rest, r'calls=%?([\w.\-]+)')
        yield from self._with_fused(called)

  def _trips(self, loop: _Instruction) -> int:
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known.group(1))
    # jax's loops count from 0 and compare the counter with a constant.
    condition = _attribute(loop.rest, r'condition=%?([\w.\-]+)')
    instructions = self._computations.get(condition, ())
    constants = {
      item.name: int(match.group(1))
      for item in instructions
      if item.opcode == 'constant' and (match := re.search(r'constant\((\d+)\)', item.rest))
    }
    for item in instructions:
      if item.opcode == 'compare' and 'direction=LT' in item.rest:
        operands = re.findall(r'%([\w.\-]+)', item.rest.partition(')')[0])
        bounds = [constants[name] for name in operands if name in constants]
        if bounds:
          return bounds[0]
    return max(constants.values(), default=1)

  def _price(self, kind: str, instruction: _Instruction) -> _Totals:
    sizes = _array_bytes(instruction.type)
    groups = self._groups(instruction.rest)
    size = groups.shape[-1] if groups is not None else self._mesh.size
    share = (size - 1) / size
    if kind == 'collective-permute':
      sent = sizes[0]
      axes = self._axes(self._pairs(instruction.rest))
    else:
      whole = sum(sizes)
      if kind == 'all-gather' and instruction.opcode.endswith('-start'):
        whole = max(sizes)  # Of the operand and the result that a start returns.
      sent = {
        'all-gather': whole * share,
        'all-reduce': 2 * whole * share,
        'reduce-scatter': whole * (size - 1),
        'all-to-all': whole * share,
      }[kind]
      axes = self._axes(groups)
    key = (kind, axes)
    return Counter({key: 1}), Counter({key: round(sent)})

  def _groups(self, rest: str) -> np.ndarray | None:
    """Devices that meet, `[groups, size]`."""
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest)
    if iota:
      shape, dims = (_integers(iota.group(i)) for i in (1, 2))
      ids = np.arange(math.prod(dims)).reshape(dims)
      if iota.group(3):
        ids = ids.transpose(_integers(iota.group(3)))
      return ids.reshape(shape)
    # XLA of jax 0.12 names axes: replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}.
    named = re.search(r'replica_groups=mesh\[([^\]]+)\][^{]*\{([^}]*)\}', rest)
    if named:
      sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
      meeting = re.findall(r"'(\w+)'", named.group(2))
      ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
      apart = [name for name in sizes if name not in meeting]
      order = [list(sizes).index(name) for name in (*apart, *meeting)]
      size = math.prod(sizes[name] for name in meeting)
      return ids.transpose(order).reshape(-1, size)
    listed = re.search(r'replica_groups=\{(\{[\d,{}]+\})\}', rest)
    if listed:
      return np.asarray(
        [_integers(group) for group in re.findall(r'\{([\d,]+)\}', listed.group(1))]
      )
    return None

  def _pairs(self, rest: str) -> np.ndarray | None:
    listed = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}', rest)
    if not listed:
      return None
    return np.asarray([_integers(pair) for pair in re.findall(r'\{([\d,]+)\}', listed.group(1))])

  def _axes(self, groups: np.ndarray | None) -> tuple[str, ...]:
    if groups is None:
      return tuple(name for name, size in self._mesh.shape.items() if size > 1)
    # Numbers in a partitioned module count the mesh's devices in the mesh's order.
    places = np.stack(np.unravel_index(groups, self._mesh.devices.shape), axis=-1)
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, moves in zip(self._mesh.axis_names, differs, strict=True) if moves)


def _parse(name: str, text: str) -> _Instruction | None:
  match = _OPCODE.search(text)
  if not match:
    return None
  return _Instruction(name, text[: match.start()], match.group(1), text[match.start() + 1 :])


def _branches(rest: str) -> list[str]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', rest)
  if listed:
    return re.findall(r'%?([\w.\-]+)', listed.group(1))
  return [_attribute(rest, rf'{kind}_computation=%?([\w.\-]+)') for kind in ('true', 'false')]


def _attribute(rest: str, pattern: str) -> str:
  match = re.search(pattern, rest)
  return match.group(1) if match else ''


def _array_bytes(type_text: str) -> list[int]:
  return [
    math.prod(_integers(dims)) * _bits(kind) // 8
    for kind, dims in _ARRAY.findall(re.sub(r'/\*.*?\*/', '', type_text))
  ]


def _bits(kind: str) -> int:
  if kind in _WIDTHS:
    return _WIDTHS[kind]
  digits = re.search(r'\d+', kind)
  return int(digits.group()) if digits else 0


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in re.findall(r'\d+', text))


def _add(total: _Totals, part: _Totals, times: int) -> None:
  for into, of in zip(total, part, strict=True):
    for key, value in of.items():
      into[key] += value * times
