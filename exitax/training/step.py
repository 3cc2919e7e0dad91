"""One optimizer step, as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from exitax.errors import UserError
from exitax.models import Dropout, DropoutConfig, ExitLM, Params, with_rows
from exitax.objectives import LossSums, ObjectiveConfig, PackedBatch, exit_objective
from exitax.training.state import TrainState
from exitax.training.trained import Trained, join_trained, split_trained, trained_depth


@struct.dataclass
class StepMetrics:
  """What one step reports.

  Attributes:
    sums: loss sums of every exit over the whole batch.
    loss: f32 scalar, the weighted objective per token.
    gradient_norm: f32 scalar, global norm before clipping.
    learning_rate: f32 scalar, used by this step.
    exit_weights: f32 `[exits + 1]`, used by this step.
  """

  sums: LossSums
  loss: jax.Array
  gradient_norm: jax.Array
  learning_rate: jax.Array
  exit_weights: jax.Array


TrainStepFn = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]

# Parameters, batch, exit weights and what is dropped to ((loss, sums), gradient of the trained ones),
# all sums over the batch.
ValueAndGradFn = Callable[
  [Params, Any, jax.Array, Dropout | None], tuple[tuple[jax.Array, LossSums], Params]
]


def make_train_step(
  model: ExitLM,
  optimizer: optax.GradientTransformation,
  *,
  objective: ObjectiveConfig,
  schedule: optax.Schedule,
  accumulation_steps: int = 1,
  value_and_grad: ValueAndGradFn | None = None,
  dropout: DropoutConfig = DropoutConfig(),
  trained: Trained = Trained.ALL,
) -> TrainStepFn:
  """A step function to be jitted with its state donated.

  The gradient is that of the mean loss per counted token over the *whole* batch, whatever the
  number of accumulation steps: sums are added up and divided once.

  Args:
    model: the model.
    optimizer: the optax transformation.
    objective: losses and their weights.
    schedule: learning rate by step, for the report.
    accumulation_steps: parts that a batch is cut into, one forward and backward each.
    value_and_grad: another way to the gradient of the objective, such as
      `PipelinedObjective.value_and_grad`; None is autodiff of the whole model.
    dropout: what is dropped; masks follow `TrainState.step` and the row of the whole batch, so
      neither resuming nor accumulation changes them.
    trained: parameters that change; the gradient is made for them alone.

  Raises:
    UserError: as `ObjectiveConfig.check`; while tracing, a batch that cannot be cut.
  """
  objective.check(model.config.exits)

  def autodiff(
    params: Params, batch: PackedBatch, weights: jax.Array, dropped: Dropout | None
  ) -> Any:
    own, frozen = split_trained(params, trained)

    def loss_fn(own: Params) -> tuple[jax.Array, LossSums]:
      return exit_objective(
        model,
        join_trained(own, frozen),
        batch,
        weights,
        config=objective,
        dropout=dropped,
        depth=trained_depth(model.config, trained),
      )

    return jax.value_and_grad(loss_fn, has_aux=True)(own)

  def of_trained(*arguments: Any) -> Any:
    """The other way's gradient, which may be that of more than is trained."""
    assert value_and_grad is not None
    result, gradient = value_and_grad(*arguments)
    return result, split_trained(gradient, trained)[0]

  gradients = of_trained if value_and_grad else autodiff

  def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, StepMetrics]:
    weights = objective.weights_at(state.step)
    dropped = dropout.at(
      state.step, num_layers=model.config.num_layers, num_rows=batch.tokens.shape[0]
    )
    if accumulation_steps == 1:
      (loss, sums), grads = gradients(state.params, batch, weights, dropped)
    else:
      (loss, sums), grads = _accumulate(
        lambda part, rows: gradients(state.params, part, weights, with_rows(dropped, rows)),
        (batch, dropped.rows if dropped else None),
        accumulation_steps,
      )
    per_token = 1.0 / jnp.maximum(sums.tokens, 1.0)
    grads = jax.tree.map(lambda g: g * per_token, grads)
    own, frozen = split_trained(state.params, trained)
    updates, opt_state = optimizer.update(grads, state.opt_state, own)
    metrics = StepMetrics(
      sums=sums,
      loss=loss * per_token,
      gradient_norm=optax.global_norm(grads),
      learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
      exit_weights=weights,
    )
    updated: Any = optax.apply_updates(own, updates)
    params = join_trained(updated, frozen)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return step


def _accumulate(gradients: Callable[..., Any], arguments: tuple[Any, ...], num_parts: int) -> Any:
  """Adds up `gradients` over `num_parts` slices of its arguments' rows, one at a time."""

  def cut(x: jax.Array) -> jax.Array:
    if x.shape[0] % num_parts:
      raise UserError(
        f'accumulation_steps={num_parts} does not divide batch_size={x.shape[0]}: choose a divisor'
      )
    # Rows i, i + parts, ...: every device's rows are spread over all parts, so nothing moves.
    return x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)

  parts = jax.tree.map(cut, arguments)
  shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(total: Any, part: Any) -> Any:
    return jax.tree.map(jnp.add, total, gradients(*part)), None

  return jax.lax.scan(add, zeros, parts)[0]
