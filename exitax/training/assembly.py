"""A run's model, optimizer and step on a mesh: what is trained, and what is compiled to plan it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from exitax.data import Batch, GroupDataConfig, Origins
from exitax.errors import UserError
from exitax.models import ExitLM, Remat
from exitax.parallel import PIPELINE_AXIS, check_batch_size, count_flops, logical_to_spec
from exitax.training.config import RunConfig
from exitax.training.optimizer import learning_rate_schedule, make_optimizer
from exitax.training.pipeline import PipelinedObjective
from exitax.training.pipelined_tuning import PipelinedTuning
from exitax.training.state import TrainState, abstract_state
from exitax.training.step import TrainStepFn, make_train_step
from exitax.training.trained import Trained


@dataclasses.dataclass(frozen=True)
class Assembly:
  """The pieces of a run.

  Attributes:
    config: the run.
    mesh: where it runs.
    model: the model.
    schedule: learning rate by step.
    optimizer: the optax transformation.
    pipelined: how gradients are made on a mesh with stages; None where there is one.
    step: the step function; jit it with its state donated.
  """

  config: RunConfig
  mesh: Mesh
  model: ExitLM
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  pipelined: PipelinedObjective | None
  step: TrainStepFn

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    return abstract_state(
      self.model, self.optimizer, self.mesh, self.config.sharding, self.config.trained
    )

  def abstract_batch(self) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    data, rules = self.config.data, self.config.sharding
    sharding = NamedSharding(self.mesh, logical_to_spec(('batch', 'length'), rules))

    def array(dtype: Any) -> Any:
      return jax.ShapeDtypeStruct((data.batch_size, data.length), dtype, sharding=sharding)

    integers, origin = array(jnp.int32), None
    if isinstance(data, GroupDataConfig):
      flags = {name: array(jnp.bool_) for name in ('by_rank', 'sees_all')}
      numbers = dict.fromkeys(('owner', 'step', 'rank', 'lag'), integers)
      origin = Origins(**numbers, **flags)
    return Batch(integers, integers, integers, integers, weights=array(jnp.float32), origin=origin)

  def model_flops(self) -> int:
    """Flops of a step that computes nothing twice and has no stages: what utilisation counts."""
    model = ExitLM(dataclasses.replace(self.config.model, remat=Remat.NONE))
    step = _step(self.config, model, self.optimizer, self.schedule)
    return count_flops(step, self.abstract_state(), self.abstract_batch()).flops


def assemble(config: RunConfig, mesh: Mesh) -> Assembly:
  """Puts a run together; nothing is allocated.

  Raises:
    UserError: a mesh that does not suit model, batch or microbatches.
  """
  model = ExitLM(config.model)
  schedule = learning_rate_schedule(config.optimizer, train_steps=config.loop.train_steps)
  optimizer = make_optimizer(config.optimizer, schedule)
  pipelined = None
  if mesh.shape[PIPELINE_AXIS] > 1:
    if isinstance(config.data, GroupDataConfig):
      raise UserError(
        'groups of thinkers train without pipeline stages: set MeshConfig.pipeline=1 '
        f'(it is {mesh.shape[PIPELINE_AXIS]})'
      )
    if config.objective.distillation:
      raise UserError(
        f'distillation={config.objective.distillation} needs the final scores where the exits are: set '
        f'MeshConfig.pipeline=1 (it is {mesh.shape[PIPELINE_AXIS]})'
      )
    kind = PipelinedTuning if config.trained is Trained.EXITS else PipelinedObjective
    pipelined = kind(
      model, mesh, config.sharding, objective=config.objective, pipeline=config.pipeline
    )
    pipelined.check_rows(config.data.batch_size // config.loop.accumulation_steps)
  check_batch_size(config.data.batch_size, mesh, config.sharding)
  # Parts smaller than the mesh would be padded: correct, and many times slower.
  check_batch_size(
    config.data.batch_size // config.loop.accumulation_steps,
    mesh,
    config.sharding,
    name='batch_size / accumulation_steps',
  )
  step = _step(config, model, optimizer, schedule, pipelined)
  return Assembly(config, mesh, model, schedule, optimizer, pipelined, step)


def _step(
  config: RunConfig,
  model: ExitLM,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  pipelined: PipelinedObjective | None = None,
) -> TrainStepFn:
  return make_train_step(
    model,
    optimizer,
    objective=config.objective,
    schedule=schedule,
    accumulation_steps=config.loop.accumulation_steps,
    value_and_grad=pipelined.value_and_grad if pipelined else None,
    dropout=config.dropout,
    trained=config.trained,
  )
