"""The state of a training run, and where its arrays lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from exitax.models import ExitLM, Params
from exitax.parallel import (
  ShardingRules,
  init_sharded,
  replicated,
  shardings_like,
  tree_shardings,
)
from exitax.training.trained import Trained, split_trained


@struct.dataclass
class TrainState:
  """Everything that an optimizer step reads and writes.

  Attributes:
    step: i32 scalar, optimizer steps taken.
    params: float32 master weights, frozen ones included.
    opt_state: the optax state, of those that are trained.
  """

  step: jax.Array
  params: Params
  opt_state: Any


def state_shardings(
  model: ExitLM,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules,
  trained: Trained = Trained.ALL,
) -> TrainState:
  """The tree of `NamedSharding`s of a `TrainState`; moments lie where their parameters lie.

  Raises:
    UserError: the mesh does not divide a dimension that the rules shard.
  """
  params = model.abstract_params()
  params_shardings = tree_shardings(params, model.logical_axes(), mesh, rules)
  opt_state = jax.eval_shape(optimizer.init, split_trained(params, trained)[0])
  step: Any = replicated(mesh)  # A sharding where the state has an array.
  return TrainState(
    step=step,
    params=params_shardings,
    opt_state=shardings_like(opt_state, params, params_shardings),
  )


def init_state(
  model: ExitLM,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  mesh: Mesh,
  rules: ShardingRules,
  trained: Trained = Trained.ALL,
) -> TrainState:
  """A fresh state, every device making only its own shards; values do not depend on the mesh."""
  params = init_sharded(model.init, key, model.logical_axes(), mesh, rules)
  shardings = state_shardings(model, optimizer, mesh, rules, trained)
  own, _ = split_trained(params, trained)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(own)
  step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
  return TrainState(step=step, params=params, opt_state=opt_state)


def abstract_state(
  model: ExitLM,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules,
  trained: Trained = Trained.ALL,
) -> TrainState:
  """The state's shapes, dtypes and shardings, for restoring a checkpoint onto this mesh."""

  def make() -> TrainState:
    params = model.init(jax.random.key(0))
    own, _ = split_trained(params, trained)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(own))

  shapes = jax.eval_shape(make)
  shardings = state_shardings(model, optimizer, mesh, rules, trained)
  return jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
    shapes,
    shardings,
  )
