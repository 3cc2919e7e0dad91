"""Layout hints by logical name: layers call `constrain`, launchers enter `use(mesh, rules)`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

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


def ambient_spec(shape: Sequence[int], logical_axes: Sequence[str | None]) -> PartitionSpec:
  """How `constrain` lays out an array of that shape: for the specs of `jax.shard_map`.

  Raises:
    RuntimeError: there is no ambient mesh.
  """
  rules, mesh = current_rules(), jax.sharding.get_abstract_mesh()
  if rules is None or mesh.empty:
    raise RuntimeError('no ambient mesh: enter use(mesh, rules)')
  return even_spec(shape, logical_axes, mesh, rules)


def mesh_sizes() -> dict[str, int]:
  """Size of every axis of the ambient mesh; empty outside of `use`."""
  mesh = jax.sharding.get_abstract_mesh()
  return {} if current_rules() is None or mesh.empty else dict(mesh.shape)


def shards_of(logical_axis: str) -> int:
  """Parts into which the ambient mesh and rules cut such a dimension here; 1 outside of `use`."""
  rules, mesh = current_rules(), jax.sharding.get_abstract_mesh()
  if rules is None or mesh.empty:
    return 1
  axes = (axis for axis in rules.mesh_axes(logical_axis) if axis not in mesh.manual_axes)
  return math.prod(mesh.shape[axis] for axis in axes)


def per_shard(
  fn: Callable[..., jax.Array],
  logical_in: Sequence[Sequence[str | None]],
  logical_out: Sequence[str | None],
) -> Callable[..., jax.Array]:
  """`fn` run by every device on its own shard: for kernels that the compiler cannot partition.

  Shards are those of the ambient mesh and rules for these logical axes; a dimension that the mesh
  does not divide is whole. Outside of `use`, on one device and where every mesh axis is manual
  already, it is `fn` itself.

  Args:
    fn: takes and returns arrays; each result shard must depend on the argument shards alone.
    logical_in: logical axes of each argument.
    logical_out: logical axes of the result, which has the shape of the first argument.
  """

  def run(*args: jax.Array) -> jax.Array:
    rules, mesh = current_rules(), jax.sharding.get_abstract_mesh()
    automatic = set(mesh.axis_names) - set(mesh.manual_axes)
    if rules is None or mesh.empty or mesh.size == 1 or not automatic:
      return fn(*args)
    specs = [
      even_spec(x.shape, axes, mesh, rules) for x, axes in zip(args, logical_in, strict=True)
    ]
    return jax.shard_map(
      fn,
      in_specs=tuple(specs),
      out_specs=even_spec(args[0].shape, logical_out, mesh, rules),
      axis_names=automatic,
      check_vma=False,
    )(*args)

  return run
