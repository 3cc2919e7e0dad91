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

from exitax.layers import fuses_attention
from exitax.objectives import VocabPlacement
from exitax.parallel import (
  DATA_AXIS,
  MESH_AXES,
  PIPELINE_AXIS,
  TENSOR_AXIS,
  Chip,
)
from exitax.planning.costs import span_cost
from exitax.planning.layout import Layout, num_common_slots
from exitax.training import Recompute, RunConfig

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
  layout = Layout(run, num_devices)
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


def _memory(layout: Layout) -> MemoryEstimate:
  parameters, cfg = layout.parameters, layout.run.model
  state = round(parameters * layout.state_over_parameters)
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


def _working(layout: Layout) -> float:
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


def _work(layout: Layout, chip: Chip | None) -> tuple[float, float, float]:
  """Executed flops of a device, bytes that it moves, and seconds of the larger, tick by tick."""
  cost, rows, tensor = layout.span(), layout.rows, layout.tensor
  ticks = layout.ticks
  blocks, heads, rest = layout.num_elements()
  blocks /= layout.plan.num_chunks  # A tick runs one chunk.
  width = layout.itemsize
  pairs = rows * layout.plan.max_layers * layout.run.model.num_heads / tensor * layout.length**2
  # A fused kernel's scores never leave the chip's own memory.
  scores = 0.0 if fuses_attention(layout.length) else _SCORE_BYTES * _CAUSAL_SHARE * pairs
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


def _links(layout: Layout, chip: Chip) -> dict[str, float]:
  """Seconds of collectives by mesh axis."""
  sent: dict[str, float] = dict.fromkeys(MESH_AXES, 0.0)
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


def _model_flops(layout: Layout) -> float:
  """Forward and backward of the whole model, without recomputation."""
  cfg, batch = layout.run.model, layout.run.data.batch_size
  one = span_cost(
    cfg, num_layers=cfg.num_layers, num_taps=1, length=layout.length, recompute=Recompute.NONE
  )
  heads = 6.0 * layout.length * cfg.embed_dim * cfg.vocab_size * len(cfg.depths)
  return batch * (one.forward_flops + one.backward_flops + heads)
