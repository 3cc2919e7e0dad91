"""Exits tuned over a pipeline: forwards only, and nothing but hidden states crosses stages.

An exit's loss depends on the frozen stream at the exit and on the exit's own parameters, which are on
the stage that holds it. So a forward tick makes its gradient right away: it travels in the sums that
a table of forwards adds up, and no table of backwards is run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from exitax.models import Dropout, ExitLM, Params
from exitax.objectives import (
  ExitSums,
  LossSums,
  ObjectiveConfig,
  PackedBatch,
  SharedParams,
  VocabPlacement,
)
from exitax.parallel import ShardingRules, StageProgram
from exitax.training.pipeline import PipelineConfig, PipelinedObjective
from exitax.training.trained import Trained, join_trained, split_trained, trained_depth


class PipelinedTuning(PipelinedObjective):
  """Value and gradient of the exits' losses on a frozen model; stages share the layers up to the last exit."""

  def __init__(
    self,
    model: ExitLM,
    mesh: Mesh,
    rules: ShardingRules,
    *,
    objective: ObjectiveConfig,
    pipeline: PipelineConfig,
  ) -> None:
    """Plans the stages, twice: for tuning, and for scores of the whole model.

    Raises:
      UserError: sizes that do not fit each other.
    """
    settings = {'objective': objective, 'pipeline': pipeline}
    self._whole = PipelinedObjective(model, mesh, rules, **settings)
    # Every exit's parameters are where its features are; there is no backward whose bubble to fill.
    own = dataclasses.replace(
      pipeline, vocab=VocabPlacement.STAGE, bubble_filling_ratio=0.0, layers_per_span=None
    )
    super().__init__(
      model,
      mesh,
      rules,
      objective=objective,
      pipeline=own,
      depth=trained_depth(model.config, Trained.EXITS),
    )

  def value_and_grad(
    self,
    params: Params,
    batch: PackedBatch,
    exit_weights: jax.Array,
    dropout: Dropout | None = None,
  ) -> tuple[tuple[jax.Array, LossSums], Params]:
    """Loss, sums of the exits (zero for the final layer), gradient of the exits' parameters."""
    assert dropout is None, 'a frozen model drops nothing'
    found: tuple[ExitSums, Params]
    found, _ = self._run(params, batch, exit_weights, self._forward_schedule)
    exits, gradient = found
    sums = LossSums(exits=exits, tokens=jnp.sum(batch.weights))
    return (self._loss(exits, exit_weights), sums), gradient

  def score(self, params: Params, batch: PackedBatch) -> LossSums:
    """Sums of every exit and the final layer."""
    return self._whole.score(params, batch)

  def check_rows(self, num_rows: int) -> None:
    """As `PipelinedObjective.check_rows`, for tuning and for scores."""
    super().check_rows(num_rows)
    self._whole.check_rows(num_rows)

  def _program(self) -> StageProgram:
    program = super()._program()

    def loss_fn(
      shared: SharedParams, taps: Any, microbatch: Any, span: jax.Array, counts: jax.Array
    ) -> tuple[jax.Array, tuple[ExitSums, Params]]:
      own, frozen = split_trained(shared.whole, Trained.EXITS)

      def of_exits(own: Params) -> tuple[jax.Array, ExitSums]:
        joined = dataclasses.replace(shared, whole=join_trained(own, frozen))
        return program.loss_fn(joined, taps, microbatch, span, counts)

      (loss, sums), gradient = jax.value_and_grad(of_exits, has_aux=True)(own)
      wide = jnp.promote_types(self._model.config.precision.dtype, jnp.float32)
      return loss, (sums, jax.tree.map(lambda x: x.astype(wide), gradient))

    return dataclasses.replace(program, loss_fn=loss_fn)
