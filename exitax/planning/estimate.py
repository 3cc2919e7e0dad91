"""A step's memory and time by arithmetic, without compiling: quick enough for thousands of layouts.

Flops and kept bytes come from traced spans (`costs.py`), everything else from shapes:

  memory   parameters and optimizer state as sharded; the compute-dtype copy of a stage's parameters
           and its float32 gradient, whole over `data`; what the microbatches in flight keep; what
           one backward works on.
  time     the larger of arithmetic at the chip's peak and memory traffic at its bandwidth, tick by
           tick (a tick lasts as long as its dearest stage), plus collectives at the links' speed,
           nothing of which is taken to be hidden. A bound from below otherwise: no chip reaches
           its peak rates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from exitax.models import ExitLM, ModelConfig, Remat, StagePlan, plan_stages
from exitax.objectives import VocabPlacement, exits_by_matrix
from exitax.parallel import (
  DATA_AXIS,
  MESH_AXES,
  PIPELINE_AXIS,
  TENSOR_AXIS,
  Chip,
  ScheduleKind,
  SequenceSharding,
  ShardingRules,
  fill_bubbles,
  make_schedule,
  parameter_report,
)
from exitax.planning.costs import SpanCost, span_cost
from exitax.training import OptimizerConfig, Recompute, RunConfig, make_optimizer

# Bytes that attention moves per score, forward, where scores go through memory: float32 scores
# written, read for the maximum and for the exponential; weights written and read in 2 bytes.
_SCORE_BYTES = 16
# Blocks of queries skip most of what lies after them: `layers/causal.py`.
_CAUSAL_SHARE = 9 / 16
# Passes over a layer's kept activations: written and read forward, read backward.
_ACTIVATION_PASSES = 3


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
  """Bytes of one device.

  Attributes:
    parameters: float32 master weights, as sharded.
    optimizer: its state.
    weights: the stage's parameters in the compute dtype, gathered over data.
    gradients: float32 sums.
    kept: what the backwards of the microbatches in flight read.
    working: what one backward works on: recomputed activations, scores, its gradient.
  """

  parameters: int
  optimizer: int
  weights: int
  gradients: int
  kept: int
  working: int

  @property
  def total(self) -> int:
    """All of it."""
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class TimeEstimate:
  """Seconds of one step.

  Attributes:
    arithmetic: executed flops at the chip's peak.
    traffic: memory traffic at its bandwidth.
    compute: the larger of the two, tick by tick.
    links: collectives, by mesh axis.
  """

  arithmetic: float
  traffic: float
  compute: float
  links: dict[str, float]

  @property
  def step(self) -> float:
    """The whole step."""
    return self.compute + sum(self.links.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a layout costs.

  Attributes:
    model_flops: of the model's forward and backward over a batch, nothing computed twice.
    executed_flops: of one device, idle ticks and recomputation included.
    bubble: share of a step in which a stage has nothing to do, mean over stages.
    memory: bytes.
    time: seconds; None without a chip.
    mfu: model flops over what the chips' peak could do in that time; None without a chip.
  """

  model_flops: float
  executed_flops: float
  bubble: float
  memory: MemoryEstimate
  time: TimeEstimate | None
  mfu: float | None


def estimate(run: RunConfig, num_devices: int, chip: Chip | None) -> Estimate:
  """Estimates one step; call it with one of the devices that are planned for as ambient mesh.

  Raises:
    UserError: a mesh that does not suit devices, model or microbatches.
  """
  layout = _Layout(run, num_devices)
  memory = _memory(layout)
  executed, traffic, compute = _work(layout, chip)
  model_flops = _model_flops(layout)
  time = mfu = None
  if chip:
    time = TimeEstimate(
      executed / chip.bf16_flops, traffic / chip.hbm_bandwidth, compute, _links(layout, chip)
    )
    mfu = model_flops / (time.step * num_devices * chip.bf16_flops)
  return Estimate(model_flops, executed, layout.bubble, memory, time, mfu)


class _Layout:
  """A run on a mesh, with the sizes that follow."""

  def __init__(self, run: RunConfig, num_devices: int) -> None:
    self.run, self.model = run, ExitLM(run.model)
    mesh = run.mesh.resolve(num_devices)
    self.data, self.stages, self.tensor = mesh.data, mesh.pipeline, mesh.tensor
    # Caches go by the model's shape: searches vary what is recomputed.
    self.shape = dataclasses.replace(run.model, remat=Remat.NONE)
    self.parameters, _ = _parameters(
      self.shape, run.sharding, (mesh.data, mesh.pipeline, mesh.tensor)
    )
    self.length = run.data.length
    self.sequence_split = run.sharding.sequence is SequenceSharding.TENSOR and self.tensor > 1
    parts = run.loop.accumulation_steps
    if self.stages > 1:
      config = run.pipeline
      self.recompute, self.vocab = config.recompute, config.vocab
      self.slots = _num_slots(
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
      min_depth=(self.plan.first_exit or 0) + 1,
    )
    return len(filled.extra_depths)

  @property
  def pipelined(self) -> bool:
    return self.stages > 1

  @property
  def bubble(self) -> float:
    return (self.stages - 1) / (self.items + self.stages - 1)

  @property
  def itemsize(self) -> int:
    return np.dtype(self.run.model.precision.dtype).itemsize

  @property
  def hidden_bytes(self) -> float:
    """The residual stream of one microbatch."""
    return self.rows * self.length * self.run.model.embed_dim * self.itemsize

  def span(self, num_layers: int | None = None, recompute: Recompute | None = None) -> SpanCost:
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
def _num_slots(kind: ScheduleKind, stages: int, microbatches: int, chunks: int) -> int:
  """Chunks in flight on a stage, with the spare slot: no more in a long step than in a short one."""
  enough = microbatches if kind is ScheduleKind.GPIPE else min(microbatches, 4 * stages)
  if kind is ScheduleKind.GPIPE:
    return enough + 1
  table = make_schedule(kind, num_stages=stages, num_microbatches=enough, num_chunks=chunks)
  return table.num_slots + 1


@functools.cache
def _parameters(
  config: ModelConfig, rules: ShardingRules, mesh: tuple[int, ...]
) -> tuple[int, int]:
  """Bytes of the parameters: on a device, and of one full copy."""
  model = ExitLM(config)
  report = parameter_report(
    model.abstract_params(), model.logical_axes(), AbstractMesh(mesh, MESH_AXES), rules
  )
  return report.bytes_per_device, report.bytes_total


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


def _memory(layout: _Layout) -> MemoryEstimate:
  parameters, cfg = layout.parameters, layout.run.model
  state = round(parameters * _state_over_parameters(layout.shape, layout.run.optimizer))
  elements = sum(layout.num_elements())
  if layout.pipelined:
    weights, gradients = elements * layout.itemsize, elements * 4
  else:
    # The compiler gathers a layer at a time; gradients lie where parameters lie.
    weights = elements / cfg.num_layers * layout.itemsize
    gradients = parameters * (2 if layout.parts > 1 else 1)
  kept = layout.span().kept(layout.tensor, sequence_split=layout.sequence_split)
  return MemoryEstimate(
    parameters=parameters,
    optimizer=state,
    weights=round(weights),
    gradients=round(gradients),
    kept=round(kept * layout.rows * layout.slots),
    working=round(_working(layout)),
  )


def _working(layout: _Layout) -> float:
  """Recomputed activations and their cotangents, scores, and one microbatch's gradient."""
  if layout.recompute is Recompute.STAGE:
    again = layout.span(recompute=Recompute.NONE)
  else:
    again = layout.span(1, Recompute.NONE)
  recomputed = again.kept(layout.tensor, sequence_split=layout.sequence_split) * layout.rows
  one = layout.span(1, Recompute.NONE)
  cotangents = one.kept(layout.tensor, sequence_split=layout.sequence_split) * layout.rows
  cfg = layout.run.model
  shares = layout.tensor
  exits = layout.plan.max_exits
  if layout.stages > 1 and layout.vocab is VocabPlacement.PIPELINE:
    shares *= layout.stages
    exits = num_common_slots(layout.model, layout.plan)
  chunk = min(layout.run.objective.chunk_length, layout.length)
  scores = 3 * 4 * exits * layout.rows * chunk * cfg.vocab_size / shares
  streams = (4 + 3 * exits) * layout.hidden_bytes
  gradient = sum(layout.num_elements()) * layout.itemsize if layout.pipelined else 0
  return recomputed + cotangents + scores + streams + gradient


def _work(layout: _Layout, chip: Chip | None) -> tuple[float, float, float]:
  """Executed flops of a device, bytes that it moves, and seconds of the larger, tick by tick."""
  cost, rows, tensor = layout.span(), layout.rows, layout.tensor
  ticks = layout.ticks
  blocks, heads, rest = layout.num_elements()
  blocks /= layout.plan.num_chunks  # A tick runs one chunk.
  width = layout.itemsize
  scores = (
    _SCORE_BYTES
    * _CAUSAL_SHARE
    * rows
    * layout.plan.max_layers
    * layout.run.model.num_heads
    / tensor
    * layout.length**2
  )
  one = layout.span(recompute=Recompute.NONE)
  activations = rows * (one.kept_split + one.kept_whole) / tensor
  again = 0 if layout.recompute is Recompute.NONE else 1
  flops_forward = cost.forward_flops * rows / tensor
  flops_backward = (cost.backward_flops * rows + layout.head_flops) / tensor
  bytes_forward = blocks * width + activations + scores
  bytes_backward = (
    (2 + again) * blocks * width
    + 8 * (blocks + heads + rest)  # The float32 gradient, read and written.
    + 3 * heads * width
    + (_ACTIVATION_PASSES - 1 + again) * activations
    + (2 + again) * scores
  )
  bytes_update = 7 * layout.parameters  # Weights and two moments both ways, the gradient.
  flops = ticks * (flops_forward + flops_backward)
  moved = ticks * (bytes_forward + bytes_backward) + bytes_update
  if not chip:
    return flops, moved, 0.0

  def seconds(flops: float, moved: float) -> float:
    return max(flops / chip.bf16_flops, moved / chip.hbm_bandwidth)

  time = ticks * (
    seconds(flops_forward, bytes_forward) + seconds(flops_backward, bytes_backward)
  ) + seconds(0, bytes_update)
  return flops, moved, time


def _links(layout: _Layout, chip: Chip) -> dict[str, float]:
  """Seconds of collectives by mesh axis."""
  sent: Counter[str] = Counter()
  ticks = layout.ticks
  hidden, layers = layout.hidden_bytes, layout.plan.max_layers
  again = 0 if layout.recompute is Recompute.NONE else 1
  if layout.tensor > 1:
    # Two regions a layer, each summed over its devices: Megatron-LM, arXiv 1909.08053, section 3.
    share = (layout.tensor - 1) / layout.tensor
    reductions = 2 * layers * (2 + again) * ticks
    sent[TENSOR_AXIS] = reductions * 2 * share * hidden
  if layout.stages > 1:
    share = (layout.stages - 1) / layout.stages
    steps = 2 * ticks * hidden
    if layout.vocab is VocabPlacement.PIPELINE:
      # Exits' features go to all stages, and their gradients come back.
      features = layout.stages * layout.plan.max_exits * hidden
      sent[PIPELINE_AXIS] += ticks * 2 * share * features
    sent[PIPELINE_AXIS] += steps * chip.ring_bandwidth / chip.neighbour_bandwidth
  if layout.data > 1:
    share = (layout.data - 1) / layout.data
    elements = sum(layout.num_elements())
    gathers = 1 if layout.pipelined else 2 * layout.parts
    reductions = 1 if layout.pipelined else layout.parts
    sent[DATA_AXIS] = share * elements * (gathers * layout.itemsize + reductions * 4)
  return {axis: sent[axis] / chip.ring_bandwidth for axis in MESH_AXES if sent[axis]}


def _model_flops(layout: _Layout) -> float:
  """Forward and backward of the whole model, without recomputation."""
  cfg, batch = layout.run.model, layout.run.data.batch_size
  one = span_cost(
    cfg, num_layers=cfg.num_layers, num_taps=1, length=layout.length, recompute=Recompute.NONE
  )
  heads = 6.0 * layout.length * cfg.embed_dim * cfg.vocab_size * len(cfg.depths)
  return batch * (one.forward_flops + one.backward_flops + heads)


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
