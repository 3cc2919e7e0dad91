"""All shortest paths by Floyd and Warshall's rounds, and sums over a tree: units that build on each other."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence

import numpy as np

from exitax.errors import UserError

DIGITS = string.digits + string.ascii_lowercase  # One character per distance or node.
_NO_PATH = '.'
_ROW = 3  # Where the row begins in the text of a unit: behind round, node and distance.


@dataclasses.dataclass(frozen=True)
class FloydWarshall:
  """Distances between all pairs of nodes, a row at a time.

  Unit `k * n + i` is row i after round k: `k i via d_0 ... d_{n-1}`, where `via` is the distance to node k
  before it; it builds on rows i and k of the round before. The prompt has the rows before the first round.

  Attributes:
    weights: i32 `[n, n]` as nested tuples; -1 where there is no edge.
  """

  weights: tuple[tuple[int, ...], ...]

  @property
  def prompt(self) -> str:
    """The rows of the matrix."""
    # As long as a unit, so that rows are found in one way whoever wrote them.
    rows = (f'{self._key(-1, row)}:{_row_text(own)}' for row, own in enumerate(self.weights))
    return f'paths {"".join(rows)}\n'

  @property
  def size(self) -> int:
    """Nodes."""
    return len(self.weights)

  @property
  def num_units(self) -> int:
    """Rows of all rounds."""
    return self.size**2

  @property
  def key_length(self) -> int:
    """Round and row."""
    return 2

  @property
  def unit_length(self) -> int:
    """Key, distance to the round's node, and row."""
    return _ROW + self.size

  def key(self, unit: int) -> str:
    """Round and row; rounds are letters, so that no key is part of a row."""
    return self._key(*divmod(unit, self.size))

  def ready(self, unit: int, written: Mapping[int, str]) -> bool:
    """Whether both rows are there."""
    return all(before in written for before in self._before(unit))

  def text(self, unit: int, written: Mapping[int, str]) -> str:
    """Row i of round k: min(d[i, j], d[i, k] + d[k, j])."""
    turn, row = divmod(unit, self.size)
    if turn == 0:
      own, through = self.weights[row], self.weights[0]
    else:
      own, through = (_row_of(written[before]) for before in self._before(unit))
    ways = [
      _nearer(own[j], own[turn] + through[j] if own[turn] >= 0 and through[j] >= 0 else -1)
      for j in range(self.size)
    ]
    return self.key(unit) + _row_text((own[turn], *ways))

  def coverage(self, writings: Sequence[tuple[int, str]]) -> float:
    """Share of the entries that are the shortest distances; a row's last writing counts."""
    table = [list(row) for row in self.weights]
    for unit, text in writings:
      table[unit % self.size] = _row_of(text)
    right = np.asarray(table) == self.distances()
    return float(np.mean(right))

  def distances(self) -> np.ndarray:
    """The solution, i64 `[n, n]`; -1 where there is no path."""
    far = 1 << 20
    table = np.asarray(self.weights)
    table = np.where(table < 0, far, table)
    for k in range(self.size):
      table = np.minimum(table, table[:, k : k + 1] + table[k])
    return np.where(table >= far, -1, table)

  @staticmethod
  def _key(turn: int, row: int) -> str:
    return f'@{string.ascii_uppercase}'[turn + 1] + DIGITS[row]

  def _before(self, unit: int) -> tuple[int, ...]:
    turn, row = divmod(unit, self.size)
    if turn == 0:
      return ()
    return ((turn - 1) * self.size + row, (turn - 1) * self.size + turn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloydWarshallTask:
  """Directed graphs at random.

  Attributes:
    num_nodes: 2 to 8.
    edge_share: probability of each edge.
    max_weight: of an edge, 1 at least.
  """

  num_nodes: int = 4
  edge_share: float = 0.5
  max_weight: int = 6
  name = 'floyd_warshall'

  def __post_init__(self) -> None:
    if not 2 <= self.num_nodes <= 8:
      raise UserError(f'num_nodes={self.num_nodes} is outside 2 to 8')
    if not 0 < self.edge_share <= 1:
      raise UserError(f'edge_share={self.edge_share} is outside (0, 1]')
    longest = (self.num_nodes - 1) * self.max_weight
    if self.max_weight < 1 or longest >= len(DIGITS):
      raise UserError(
        f'max_weight={self.max_weight}: paths of up to {longest} must be from 1 to {len(DIGITS) - 1}'
      )

  def problem(self, rng: np.random.Generator) -> FloydWarshall:
    """A graph."""
    size = (self.num_nodes, self.num_nodes)
    weights = rng.integers(1, self.max_weight + 1, size)
    weights = np.where(rng.random(size) < self.edge_share, weights, -1)
    np.fill_diagonal(weights, 0)
    return FloydWarshall(tuple(map(tuple, weights.tolist())))


@dataclasses.dataclass(frozen=True)
class TreeSum:
  """Sums modulo 100 over a binary tree; node i has the children 2i + 1 and 2i + 2, the leaves are given.

  A unit is an inner node: `node value`, two digits. It builds on the children that are inner nodes.

  Attributes:
    leaves: as many as a power of two, from left to right.
  """

  leaves: tuple[int, ...]

  @property
  def prompt(self) -> str:
    """The leaves."""
    return f'sum {" ".join(f"{leaf:02d}" for leaf in self.leaves)}\n'

  @property
  def num_units(self) -> int:
    """Inner nodes."""
    return len(self.leaves) - 1

  @property
  def key_length(self) -> int:
    """The node."""
    return 1

  @property
  def unit_length(self) -> int:
    """The node and its value."""
    return 3

  def key(self, unit: int) -> str:
    """A letter, so that no key is part of a value."""
    return string.ascii_letters[unit]

  def ready(self, unit: int, written: Mapping[int, str]) -> bool:
    """Whether both children have values."""
    return all(child >= self.num_units or child in written for child in _children(unit))

  def text(self, unit: int, written: Mapping[int, str]) -> str:
    """The sum of its children."""
    values = [
      self.leaves[child - self.num_units] if child >= self.num_units else int(written[child][1:])
      for child in _children(unit)
    ]
    return f'{self.key(unit)}{sum(values) % 100:02d}'

  def coverage(self, writings: Sequence[tuple[int, str]]) -> float:
    """Share of the nodes whose last writing is right."""
    right, last = self.solution(), dict(writings)
    return sum(last.get(unit) == text for unit, text in right.items()) / len(right)

  def solution(self) -> dict[int, str]:
    """The text of every unit."""
    written: dict[int, str] = {}
    for unit in reversed(range(self.num_units)):
      written[unit] = self.text(unit, written)
    return written


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeSumTask:
  """Leaves at random.

  Attributes:
    depth: levels of inner nodes; 2^depth leaves.
  """

  depth: int = 4
  name = 'tree_sum'

  def __post_init__(self) -> None:
    if not 1 <= self.depth <= 5:
      raise UserError(f'depth={self.depth} is outside 1 to 5')

  def problem(self, rng: np.random.Generator) -> TreeSum:
    """A tree."""
    return TreeSum(tuple(rng.integers(0, 100, 2**self.depth).tolist()))


def _children(node: int) -> tuple[int, int]:
  return 2 * node + 1, 2 * node + 2


def _nearer(one: int, two: int) -> int:
  return max(one, two) if min(one, two) < 0 else min(one, two)


def _row_text(row: Sequence[int]) -> str:
  return ''.join(_NO_PATH if value < 0 else DIGITS[min(value, len(DIGITS) - 1)] for value in row)


def _row_of(text: str) -> list[int]:
  """The distances in a unit's text; what is no digit is no path."""
  return [DIGITS.find(char) for char in text[_ROW:]]
