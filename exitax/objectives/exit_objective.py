"""The training objective: L = L_final + sum_i w_i(t) L_i over a model's exits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from exitax.errors import UserError
from exitax.models import Dropout, ExitConfig, ExitLM, Params, features_at_exits
from exitax.objectives.cross_entropy import ExitSums, Teacher, exit_cross_entropy
from exitax.objectives.schedules import ExitCurriculum, ExitWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """What is minimised.

  Attributes:
    exit_weights: one weight schedule per exit, shallow to deep; the final layer's weight is 1.
    curriculum: which exits count at which step.
    distillation: share of the final layer's distribution in the exits' targets (self-distillation): 0
      learns from the text alone, 1 from the final layer alone, which learns from the text.
    z_loss: weight of the squared log-partition function, for every exit and the final head.
    chunk_length: positions of each sequence whose logits live at once.
  """

  exit_weights: tuple[ExitWeight, ...] = ()
  curriculum: ExitCurriculum = ExitCurriculum()
  distillation: float = 0.0
  z_loss: float = 0.0
  chunk_length: int = 128

  def __post_init__(self) -> None:
    object.__setattr__(self, 'exit_weights', tuple(self.exit_weights))
    if not 0 <= self.distillation <= 1:
      raise UserError(f'distillation={self.distillation} is outside [0, 1]: it is a share')
    if self.z_loss < 0:
      raise UserError(f'z_loss={self.z_loss} is negative: choose 0 or more')
    if self.chunk_length < 1:
      raise UserError(f'chunk_length={self.chunk_length} must be at least 1')

  def check(self, exits: tuple[ExitConfig, ...]) -> None:
    """Raises UserError unless there is one weight per exit."""
    if len(self.exit_weights) != len(exits):
      raise UserError(
        f'{len(self.exit_weights)} exit weights for {len(exits)} exits: '
        'give ObjectiveConfig.exit_weights one ExitWeight per exit of the model'
      )

  def weights_at(self, step: jax.Array | int) -> jax.Array:
    """Weights of all exits and, last, of the final layer: f32 `[exits + 1]`."""
    weights = [weight.at(step) for weight in self.exit_weights]
    weights = jnp.stack([*weights, jnp.ones((), jnp.float32)])
    return weights * self.curriculum.at(step, num_exits=len(self.exit_weights))


@struct.dataclass
class LossSums:
  """Sums over a batch; add those of several batches before dividing by `tokens`.

  Attributes:
    exits: per exit, the final layer last: negative log-likelihood and the like, `[exits + 1]`.
    tokens: f32 scalar, the sum of token weights.
  """

  exits: ExitSums
  tokens: jax.Array


class PackedBatch(Protocol):
  """The arrays of a packed batch that an objective reads, as `exitax.data.Batch` has them.

  Attributes:
    tokens: i32 `[batch, length]`.
    targets: i32 `[batch, length]`.
    segment_ids: i32 `[batch, length]`; 0 is padding.
    positions: i32 `[batch, length]`.
    weights: f32 `[batch, length]`; 0 leaves a target out.

  In rows that the texts of a group share there is also `origin`: whose each token is.
  """

  tokens: jax.Array
  targets: jax.Array
  segment_ids: jax.Array
  positions: jax.Array
  weights: jax.Array


def exit_objective(
  model: ExitLM,
  params: Params,
  batch: PackedBatch,
  exit_weights: jax.Array,
  *,
  config: ObjectiveConfig,
  dropout: Dropout | None = None,
  depth: int | None = None,
) -> tuple[jax.Array, LossSums]:
  """Weighted *sum* of token losses; divide value and gradient by the tokens of all batches.

  Args:
    model: the model.
    params: parameters with stacked blocks.
    batch: packed tokens.
    exit_weights: f32 `[exits + 1]`, from `ObjectiveConfig.weights_at`.
    config: z-loss and slice length; its weights are not read here.
    dropout: what a training step drops; None outside of training.
    depth: how many layers to run; exits behind them, and the final head, count nothing.

  Returns:
    The loss, a scalar, and the sums of every exit for metrics.
  """
  features = features_at_exits(
    model,
    params,
    batch.tokens,
    batch.segment_ids,
    batch.positions,
    origin=getattr(batch, 'origin', None),
    dropout=dropout,
    depth=depth,
  )
  loss, sums = losses_of_exits(
    model, params, dict(enumerate(features)), batch, exit_weights, config=config
  )
  return loss, LossSums(exits=sums, tokens=jnp.sum(batch.weights))


def losses_of_exits(
  model: ExitLM,
  params: Params,
  features: Mapping[int, jax.Array],
  batch: PackedBatch,
  exit_weights: jax.Array,
  *,
  config: ObjectiveConfig,
) -> tuple[jax.Array, ExitSums]:
  """Weighted sum of the losses of some exits.

  Args:
    model: the model.
    params: parameters; only the vocabulary matrices are read.
    features: number of the exit (the final head's is the last) -> `[batch, length, embed]`.
    batch: packed tokens; only targets and weights are read.
    exit_weights: f32 `[exits + 1]`.
    config: z-loss and slice length.

  Returns:
    The loss, a scalar, and the sums of all exits, zero for those that are not in `features`.
  """
  heads = (*model.config.exits, None)
  wide = jnp.promote_types(model.config.precision.dtype, jnp.float32)
  loss = jnp.zeros((), wide)
  sums: dict[int, ExitSums] = {}
  # Exits that read the same matrix go through it together, so that its gradient exists once.
  for group in exits_by_matrix(model, features):
    result: Any = exit_cross_entropy(
      jnp.stack([features[i] for i in group]),
      model.vocab_matrix(params, heads[group[0]]),
      batch.targets,
      batch.weights,
      exit_weights[jnp.asarray(group)],
      config.z_loss,
      config.chunk_length,
      model.config.precision,
      None,
      _teacher(model, params, features, group, share=config.distillation),
    )
    group_loss, group_sums = result
    loss += group_loss
    for place, i in enumerate(group):
      sums[i] = jax.tree.map(lambda x, place=place: x[place], group_sums)
  zero = jnp.zeros((), wide)
  none = ExitSums(nll=zero, log_z_squared=zero, correct=zero)
  every = [sums.get(i, none) for i in range(len(heads))]
  return loss, jax.tree.map(lambda *xs: jnp.stack(xs), *every)


def _teacher(
  model: ExitLM,
  params: Params,
  features: Mapping[int, jax.Array],
  group: tuple[int, ...],
  *,
  share: float,
) -> Teacher | None:
  """The final layer as the early exits of a group learn from it."""
  final = len(model.config.exits)
  early = [i != final for i in group]
  if not share or not any(early):
    return None
  return Teacher(
    features=jax.lax.stop_gradient(features[final]),
    matrix=jax.lax.stop_gradient(model.vocab_matrix(params, None)),
    shares=share * jnp.asarray(early, jnp.float32),
  )


def exits_by_matrix(model: ExitLM, exits: Iterable[int]) -> list[tuple[int, ...]]:
  """Numbers of exits (the final head's is the last), grouped by the matrix that they read."""
  heads = (*model.config.exits, None)
  groups: dict[tuple[str, ...], list[int]] = {}
  for i in exits:
    groups.setdefault(model.vocab_matrix_path(heads[i]), []).append(i)
  return [tuple(group) for group in groups.values()]
