"""Layout hints by logical name: layers call `constrain`, launchers enter `use(mesh, rules)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from exitax.parallel.rules import ShardingRules, check_rank, even_spec, logical_to_spec

# A JAX user context, not a ContextVar: its value is part of every jit cache key, so a function
# traced under one set of rules is traced again under another, even on the same mesh.
_RULES = jax.make_user_context(None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
  """Makes `mesh` and `rules` the ambient ones for everything traced inside (this thread only)."""
  with jax.set_mesh(mesh), _RULES(rules):
    yield


def current_rules() -> ShardingRules | None:
  """The rules of the innermost `use`, or None outside."""
  return _RULES.value


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
  """`x` laid out over the ambient mesh as the ambient rules say for these logical axes.

  The value never changes. Adds nothing to the program outside `use` or on a mesh of one device.
  A dimension that the mesh does not divide (a batch of 1 while decoding) stays whole, since this
  is a hint; a dimension named None is whole by request. Inside `jax.shard_map` the manual mesh
  axes are left out.

  Raises:
    ValueError: not one name per dimension.
    UserError: unknown name, or two dimensions on one mesh axis (inside `use`, on any mesh).
  """
  check_rank(x.shape, logical_axes, 'constrain')
  rules = current_rules()
  if rules is None:
    return x
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    logical_to_spec(logical_axes, rules)  # A wrong name shows on one device too.
    return x
  if set(mesh.manual_axes) == set(mesh.axis_names):
    return x
  return jax.lax.with_sharding_constraint(x, even_spec(x.shape, logical_axes, mesh, rules))
