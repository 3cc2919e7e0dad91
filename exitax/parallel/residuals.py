"""The residuals of a differentiated function as arrays: to keep them, and to pull back later.

`jax.vjp` returns a pullback that is a tree whose leaves are what it has kept. Most of them do not
depend on the activations at all (weights, masks, angles): those are there again when the pullback
is needed, and only the others are worth keeping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

PyTree = Any


def residuals_of(fn: Callable[..., PyTree], *args: PyTree) -> tuple[PyTree, tuple[jax.Array, ...]]:
  """`fn(*args)`, and what its pullback reads that depends on the last argument."""
  out, pull_back = jax.vjp(fn, *args)
  leaves = jax.tree.leaves(pull_back)
  depends = _depends_on_last(fn, args)
  return out, tuple(leaf for leaf, kept in zip(leaves, depends, strict=True) if kept)


def rebuild_pullback(
  fn: Callable[..., PyTree], residuals: Sequence[jax.Array], *args: PyTree
) -> Callable[[PyTree], PyTree]:
  """The pullback of `fn` at the place where `residuals_of` was called.

  `args` must be the same, but for the last one, of which only the shape counts: whatever is
  computed from it here is replaced by residuals, and dropped by the compiler.
  """
  _, pull_back = jax.vjp(fn, *args)
  leaves, treedef = jax.tree.flatten(pull_back)
  kept = iter(residuals)
  leaves = [
    next(kept) if depends else leaf
    for leaf, depends in zip(leaves, _depends_on_last(fn, args), strict=True)
  ]
  return jax.tree.unflatten(treedef, leaves)


def _depends_on_last(fn: Callable[..., PyTree], args: Sequence[PyTree]) -> list[bool]:
  """Whether each leaf of the pullback depends on the last argument."""

  def pullback_leaves(*args: PyTree) -> list[jax.Array]:
    return jax.tree.leaves(jax.vjp(fn, *args)[1])

  jaxpr = jax.make_jaxpr(pullback_leaves)(*args).jaxpr
  num_last = len(jax.tree.leaves(args[-1]))
  num_others = len(jaxpr.invars) - num_last
  return _propagate(jaxpr, [False] * num_others + [True] * num_last)


def _propagate(jaxpr: Any, marks: Sequence[bool]) -> list[bool]:
  """Which outputs depend on marked inputs."""
  marked = {var for var, mark in zip(jaxpr.invars, marks, strict=True) if mark}

  def is_marked(atom: Any) -> bool:
    return not isinstance(atom, core.Literal) and atom in marked

  for eqn in jaxpr.eqns:
    inputs = [is_marked(atom) for atom in eqn.invars]
    outputs = _outputs_marked(eqn, inputs)
    marked.update(var for var, mark in zip(eqn.outvars, outputs, strict=True) if mark)
  return [is_marked(atom) for atom in jaxpr.outvars]


def _outputs_marked(eqn: Any, inputs: Sequence[bool]) -> list[bool]:
  inner = _body(eqn)
  if inner is None or len(inner.invars) != len(inputs):
    return [any(inputs)] * len(eqn.outvars)
  if eqn.primitive.name != 'scan':
    return _propagate(inner, inputs)
  # A scan's body reads its own carry: marks grow until they stay. What is stacked or cut along the
  # first axis has one axis less inside; the carry has as many.
  num_carry = _num_of_same_rank(eqn.outvars, inner.outvars)
  first = _num_of_same_rank(eqn.invars, inner.invars) - num_carry
  marks = list(inputs)
  while True:
    outputs = _propagate(inner, marks)
    carried = marks[first : first + num_carry]
    grown = [a or b for a, b in zip(carried, outputs[:num_carry], strict=True)]
    if grown == carried:
      return outputs
    marks[first : first + num_carry] = grown


def _body(eqn: Any) -> Any:
  """The jaxpr of a call or a scan; None for everything else."""
  if eqn.primitive.name not in ('jit', 'pjit', 'scan'):
    return None
  return eqn.params['jaxpr'].jaxpr


def _num_of_same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
  return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))
