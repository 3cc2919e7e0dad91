"""Floating-point operations of a function, counted from its jaxpr.

XLA's own `cost_analysis` counts a loop's body once, so it cannot price a scan over layers. Here
each equation is priced and multiplied by the trip counts around it. Counted are matrix products
and convolutions, 2 flops per multiply-add: what peak rates of chips are quoted in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class FlopCount:
  """Flops of one call, summed over all devices.

  Attributes:
    flops: counted operations; of a `cond`, the most expensive branch.
    num_open_loops: `while` loops with flops inside, whose trip count is not in the program and
      which are counted as one trip. Above 0, `flops` is a lower bound.
  """

  flops: int = 0
  num_open_loops: int = 0

  def __add__(self, other: FlopCount) -> FlopCount:
    return FlopCount(self.flops + other.flops, self.num_open_loops + other.num_open_loops)

  def times(self, trips: int) -> FlopCount:
    """The count of a loop with this body."""
    return FlopCount(self.flops * trips, self.num_open_loops if trips else 0)


def count_flops(fn: Callable[..., Any], *args: Any) -> FlopCount:
  """Flops that `fn(*args)` executes, recomputation by `jax.checkpoint` included.

  Nothing runs: arguments may be `jax.ShapeDtypeStruct`s. For the utilisation of a model (MFU,
  PaLM, arXiv:2204.02311) count the step without recomputation. Results that nobody uses are left
  out, as the compiler drops them. Calls without a jaxpr (cuDNN attention) count as zero.
  """
  return count_jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr_flops(jaxpr: Any) -> FlopCount:
  """As `count_flops`, for an open jaxpr whose every output is used."""
  return _count(jaxpr, [True] * len(jaxpr.outvars))


def _count(jaxpr: Any, used_outputs: Sequence[bool]) -> FlopCount:
  """Walks backwards, so that an equation is priced only if something after it needs it."""
  total = FlopCount()
  for eqn, used in _needed(jaxpr, used_outputs)[0]:
    total += _PRICES.get(eqn.primitive.name, _call_flops)(eqn, used)
  return total


def _needed(
  jaxpr: Any, used_outputs: Sequence[bool]
) -> tuple[list[tuple[Any, list[bool]]], list[bool]]:
  """Equations that the used outputs need, last first, with which of their results are used; and
  which inputs they need.
  """
  live = {
    var
    for var, used in zip(jaxpr.outvars, used_outputs, strict=True)
    if used and not isinstance(var, core.Literal)
  }
  needed = []
  for eqn in reversed(jaxpr.eqns):
    used = [var in live for var in eqn.outvars]
    if not any(used) and not eqn.effects:
      continue
    needed.append((eqn, used))
    reads = _READS.get(eqn.primitive.name, _reads_all)(eqn, used)
    live.update(
      var
      for var, is_read in zip(eqn.invars, reads, strict=True)
      if is_read and not isinstance(var, core.Literal)
    )
  return needed, [var in live for var in jaxpr.invars]


def _reads_all(eqn: Any, used: Sequence[bool]) -> list[bool]:
  del used
  return [True] * len(eqn.invars)


def _call_reads(eqn: Any, used: Sequence[bool]) -> list[bool]:
  return _needed(eqn.params['jaxpr'].jaxpr, used)[1]


def _scan_reads(eqn: Any, used: Sequence[bool]) -> list[bool]:
  inner = eqn.params['jaxpr'].jaxpr
  return _needed(inner, _used_by_scan(eqn, used))[1]


def _used_by_scan(eqn: Any, used: Sequence[bool]) -> list[bool]:
  """Which of a scan body's outputs count: of the carry, what is used after the loop or feeds it."""
  inner, num_carry = eqn.params['jaxpr'].jaxpr, _num_carry(eqn.params)
  first = len(inner.invars) - num_carry - _num_scanned(eqn, num_carry)
  marks = list(used)
  while True:
    reads = _needed(inner, marks)[1][first : first + num_carry]
    grown = [a or b for a, b in zip(marks[:num_carry], reads, strict=True)]
    if grown == marks[:num_carry]:
      return marks
    marks[:num_carry] = grown


def _num_scanned(eqn: Any, num_carry: int) -> int:
  params = eqn.params
  if 'num_consts' in params:
    return len(eqn.invars) - params['num_consts'] - num_carry
  _, _, scanned = params['ft_in'].unpack()
  return len(scanned)


def _dot_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  del used
  return _product_flops(eqn, eqn.params['dimension_numbers'])


def _ragged_dot_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  """Each row of `[m, k]` meets one group's `[k, n]`, whichever group that is."""
  del used
  return _product_flops(eqn, eqn.params['ragged_dot_dimension_numbers'].dot_dimension_numbers)


def _product_flops(eqn: Any, dimension_numbers: Any) -> FlopCount:
  (lhs_contract, _), _ = dimension_numbers
  lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
  contracted = math.prod(lhs.shape[dim] for dim in lhs_contract)
  return FlopCount(2 * contracted * math.prod(out.shape))


def _conv_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  """Output elements x window x input channels of one group; padding counts as work."""
  del used
  kernel = eqn.invars[1].aval
  out_channels = kernel.shape[eqn.params['dimension_numbers'].rhs_spec[0]]
  per_output = math.prod(kernel.shape) // out_channels
  batches = eqn.params['batch_group_count']
  return FlopCount(2 * per_output * math.prod(eqn.outvars[0].aval.shape) // batches)


def _scan_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  body = eqn.params['jaxpr'].jaxpr
  return _count(body, _used_by_scan(eqn, used)).times(eqn.params['length'])


def _num_carry(params: Mapping[str, Any]) -> int:
  if 'num_carry' in params:
    return params['num_carry']
  _, carry, _ = params['ft_in'].unpack()  # jax 0.12: constants, carry, scanned inputs.
  return len(carry)


def _while_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  del used
  body = count_jaxpr_flops(eqn.params['body_jaxpr'].jaxpr)
  condition = count_jaxpr_flops(eqn.params['cond_jaxpr'].jaxpr)
  once = body + condition
  return once + FlopCount(num_open_loops=1 if once.flops else 0)


def _cond_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  branches = [_count(branch.jaxpr, used) for branch in eqn.params['branches']]
  return FlopCount(
    max(branch.flops for branch in branches), max(branch.num_open_loops for branch in branches)
  )


def _shard_map_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  """The body is one shard's program: once per coordinate of the manual axes."""
  mesh = eqn.params['mesh']
  shards = math.prod(mesh.shape[axis] for axis in eqn.params['newly_manual_axes'])
  return _count(eqn.params['jaxpr'], used).times(shards)


def _pallas_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  """The kernel once per grid point; kernels write to references, so nothing in it is unused.

  jax's splash attention skips the blocks that its mask hides, which the grid does not tell: priced
  as causal, of n x n blocks n (n + 1) / 2.
  """
  del used
  grid = eqn.params['grid_mapping'].grid
  once = _sum(_all_flops(jaxpr) for jaxpr in _sub_jaxprs(eqn.params))
  trips = math.prod(grid)
  if 'splash' in str(eqn.params.get('name') or eqn.params.get('name_and_src_info')):
    blocks = max(grid[-2:])
    trips = trips * (blocks + 1) // (2 * blocks)
  return once.times(trips)


def _call_flops(eqn: Any, used: Sequence[bool]) -> FlopCount:
  """jit, checkpoint, custom_vjp and their like: the body once. No body, no flops."""
  counts = []
  for jaxpr in _sub_jaxprs(eqn.params):
    same_outputs = len(jaxpr.outvars) == len(used)
    counts.append(_count(jaxpr, used) if same_outputs else count_jaxpr_flops(jaxpr))
  return _sum(counts)


def _all_flops(jaxpr: Any) -> FlopCount:
  return _sum(
    _PRICES.get(eqn.primitive.name, _call_flops)(eqn, [True] * len(eqn.outvars))
    for eqn in jaxpr.eqns
  )


def _sub_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _sum(counts: Any) -> FlopCount:
  return sum(counts, start=FlopCount())


_PRICES: dict[str, Callable[[Any, Sequence[bool]], FlopCount]] = {
  'dot_general': _dot_flops,
  'ragged_dot_general': _ragged_dot_flops,
  'conv_general_dilated': _conv_flops,
  'scan': _scan_flops,
  'while': _while_flops,
  'cond': _cond_flops,
  'shard_map': _shard_map_flops,
  'pallas_call': _pallas_flops,
}

# What an equation reads, given which of its results are used; all of it unless listed.
_READS: dict[str, Callable[[Any, Sequence[bool]], list[bool]]] = {
  'jit': _call_reads,
  'pjit': _call_reads,
  'scan': _scan_reads,
}
