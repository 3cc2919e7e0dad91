"""A run laid out on a mesh: the sizes that memory and time follow from."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from exitax.models import ExitLM, ModelConfig, Remat, StagePlan, plan_stages
from exitax.objectives import VocabPlacement, exits_by_matrix
from exitax.parallel import (
  MESH_AXES,
  ScheduleKind,
  SequenceSharding,
  ShardingRules,
  fill_bubbles,
  make_schedule,
  parameter_report,
)
from exitax.planning.costs import SpanCost, span_cost
from exitax.training import OptimizerConfig, Recompute, RunConfig, make_optimizer


class Layout:
  """A run on a mesh, with the sizes that follow.

  Attributes:
    run: the run.
    model: its model.
    shape: the model's configuration without what searches vary.
    data: size of the mesh axis; so are `stages` and `tensor`.
    parameters: bytes of a device's master weights.
    length: tokens of a row.
    sequence_split: the stream between tensor-parallel regions is cut along its length.
    recompute: what a backward computes again; with one stage, what the model's `remat` says.
    vocab: who computes the scores of an exit.
    plan: layers and exits of the stages.
    slots: chunks that a stage keeps, with the spare one.
    items: forwards of a stage in one run of the table.
    parts: runs of the table in a step.
    rows: rows of a microbatch.
  """

  def __init__(self, run: RunConfig, num_devices: int) -> None:
    self.run, self.model = run, ExitLM(run.model)
    mesh = run.mesh.resolve(num_devices)
    self.data, self.stages, self.tensor = mesh.data, mesh.pipeline, mesh.tensor
    # Caches go by the model's shape: searches vary what is recomputed.
    self.shape = dataclasses.replace(run.model, remat=Remat.NONE)
    self.parameters = _parameters(self.shape, run.sharding, (mesh.data, mesh.pipeline, mesh.tensor))
    self.length = run.data.length
    self.sequence_split = run.sharding.sequence is SequenceSharding.TENSOR and self.tensor > 1
    parts = run.loop.accumulation_steps
    if self.stages > 1:
      config = run.pipeline
      self.recompute, self.vocab = config.recompute, config.vocab
      self.slots = num_slots(
        config.schedule, self.stages, config.num_microbatches, config.num_chunks
      )
      self.items = config.num_microbatches * config.num_chunks
      self.plan = plan_stages(
        run.model,
        num_stages=self.stages,
        num_chunks=config.num_chunks,
        layers_per_span=config.layers_per_span,
      )
      parts *= config.num_microbatches + self._num_extras()
    else:
      self.recompute, self.vocab = _FROM_REMAT[run.model.remat], VocabPlacement.STAGE
      self.plan = plan_stages(run.model, num_stages=1)
      self.slots = self.items = 1
    self.parts = run.loop.accumulation_steps
    self.rows = run.data.batch_size / (self.data * parts)

  def _num_extras(self) -> int:
    """Microbatches in the bubble: as many in a long step as in a short one."""
    config = self.run.pipeline
    if not config.bubble_filling_ratio:
      return 0
    table = make_schedule(config.schedule, num_stages=self.stages, num_microbatches=2 * self.stages)
    filled = fill_bubbles(
      table,
      backward_over_forward=config.bubble_filling_ratio,
      min_depth=self.plan.stages_to_first_exit,
    )
    return len(filled.extra_depths)

  @property
  def pipelined(self) -> bool:
    """Whether there is more than one stage."""
    return self.stages > 1

  @property
  def state_over_parameters(self) -> float:
    """Bytes of the optimizer's state over those of the parameters."""
    return _state_over_parameters(self.shape, self.run.optimizer)

  @property
  def bubble(self) -> float:
    """Share of a step in which a stage has nothing to do, partial microbatches not counted."""
    return (self.stages - 1) / (self.items + self.stages - 1)

  @property
  def itemsize(self) -> int:
    """Bytes of a number in the compute dtype."""
    return np.dtype(self.run.model.precision.dtype).itemsize

  @property
  def hidden_bytes(self) -> float:
    """The residual stream of one microbatch."""
    return self.rows * self.length * self.run.model.embed_dim * self.itemsize

  def span(self, num_layers: int | None = None, recompute: Recompute | None = None) -> SpanCost:
    """Costs of a chunk, or of so many layers, with the layout's recomputation or another."""
    return span_cost(
      self.run.model,
      num_layers=num_layers or self.plan.max_layers,
      num_taps=min(self.plan.max_exits, num_layers or self.plan.max_layers),
      length=self.length,
      recompute=recompute or self.recompute,
    )

  @property
  def ticks(self) -> int:
    """Ticks with a forward of a whole step, and as many with a backward."""
    return self.parts * (self.items + self.stages - 1)

  @property
  def head_flops(self) -> float:
    """Of one backward tick on the dearest stage: scores, and their two gradients."""
    cfg = self.run.model
    one = 6.0 * self.rows * self.length * cfg.embed_dim * cfg.vocab_size
    if self.stages > 1 and self.vocab is VocabPlacement.PIPELINE:
      return one * num_common_slots(self.model, self.plan) / self.stages
    return one * self.plan.max_exits

  def num_elements(self) -> tuple[float, float, float]:
    """Parameters of a stage that are blocks, exits' matrices, and the rest; whole over data."""
    blocks, total = _parameter_sizes(self.shape)
    held = self.plan.max_layers * self.plan.num_chunks / self.run.model.num_layers
    cfg = self.run.model
    matrices = len(exits_by_matrix(self.model, range(len(self.plan.depths))))
    rest = total - blocks
    heads = matrices * cfg.vocab_size * cfg.embed_dim
    if self.stages > 1 and self.vocab is VocabPlacement.PIPELINE:
      # Lookups read a copy of the input matrix that is whole.
      rest -= heads - (cfg.vocab_size * cfg.embed_dim if cfg.tie_embeddings else 0)
      heads /= self.stages
    else:
      rest -= heads
    return blocks * held / self.tensor, heads / self.tensor, max(rest, 0.0)


@functools.cache
def num_slots(kind: ScheduleKind, stages: int, microbatches: int, chunks: int) -> int:
  """Chunks in flight on a stage, with the spare slot: no more in a long step than in a short one."""
  enough = microbatches if kind is ScheduleKind.GPIPE else min(microbatches, 4 * stages)
  if kind is ScheduleKind.GPIPE:
    return enough + 1
  table = make_schedule(kind, num_stages=stages, num_microbatches=enough, num_chunks=chunks)
  return table.num_slots + 1


@functools.cache
def _parameters(config: ModelConfig, rules: ShardingRules, mesh: tuple[int, ...]) -> int:
  """Bytes of the parameters on a device."""
  model = ExitLM(config)
  report = parameter_report(
    model.abstract_params(), model.logical_axes(), AbstractMesh(mesh, MESH_AXES), rules
  )
  return report.bytes_per_device


@functools.cache
def _parameter_sizes(config: ModelConfig) -> tuple[int, int]:
  """Elements of the blocks, and of everything."""
  sizes = jax.tree.map(lambda x: math.prod(x.shape), ExitLM(config).abstract_params())
  return sum(jax.tree.leaves(sizes['blocks'])), sum(jax.tree.leaves(sizes))


@functools.cache
def _state_over_parameters(config: ModelConfig, optimizer: OptimizerConfig) -> float:
  """Bytes of the optimizer's state over those of the parameters."""
  params = ExitLM(config).abstract_params()
  state = jax.eval_shape(make_optimizer(optimizer, lambda step: 0.0).init, params)
  return _bytes(state) / _bytes(params)


_FROM_REMAT = {
  Remat.NONE: Recompute.NONE,
  Remat.DOTS: Recompute.SELECTIVE,
  Remat.FULL: Recompute.LAYER,
}


def num_common_slots(model: ExitLM, plan: StagePlan) -> int:
  """Exits' scores that a tick computes when all stages share them (`VocabPlacement.PIPELINE`).

  A place for an exit counts once for every matrix that some chunk's exit there reads.
  """
  slots = 0
  for exits in exits_by_matrix(model, range(len(plan.depths))):
    slots += len(
      {
        (span % plan.num_stages, slot)
        for span, held in enumerate(plan.exits)
        for slot, index in enumerate(held)
        if index in exits
      }
    )
  return slots


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
