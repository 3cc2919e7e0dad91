"""Exit policies: where a token may leave the stack of layers, and what follows for the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, SupportsFloat, cast

import numpy as np

from exitax.decode.acceptance import Acceptance
from exitax.decode.confidence import OF_SCORES, Confidence
from exitax.decode.depth import ExitPlan
from exitax.decode.draft_choice import DraftCosts, draft_buckets, estimate_costs
from exitax.decode.pipeline import PipelinePlan
from exitax.decode.plan import Record, StepPlan
from exitax.decode.segments import Filling
from exitax.decode.speculation import DraftPlan
from exitax.decode.stage_placement import StagedPlacement
from exitax.errors import UserError
from exitax.models import ExitConfig, ModelConfig, plan_stages
from exitax.parallel import PIPELINE_AXIS, TENSOR_AXIS, mesh_sizes

MAX_DRAFTS = 31  # Lanes are padded to a power of 2; more would rarely all be accepted.


class ExitPolicy(Protocol):
  """What `generate` asks of a policy."""

  def plan(self, config: ModelConfig) -> StepPlan:
    """The static part."""
    ...

  def thresholds(self, config: ModelConfig) -> tuple[float, ...]:
    """One threshold per exit of the plan; a token stops where its confidence is above (`>`)."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullDepth:
  """Runs every layer for every token.

  Attributes:
    confidence: what is recorded of the final layer.
    num_top: alternatives whose log-probabilities are recorded per token.
  """

  confidence: Confidence = Confidence.MAX_PROB
  num_top: int = 0

  def plan(self, config: ModelConfig) -> ExitPlan:
    return ExitPlan(
      exits=(), num_layers=config.num_layers, confidence=self.confidence, num_top=self.num_top
    )

  def thresholds(self, config: ModelConfig) -> tuple[float, ...]:
    return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdExit:
  """Stops at the first exit that is confident enough: what the four policies below share.

  Attributes:
    threshold: in [0, 1], one for all exits or one per exit. Confidence must be above it: 1.0 never
      exits. Sweeping it does not recompile.
    confidence: what is compared with it.
    layers: layers of the exits to use; None uses all of the model's.
    patience: exits in a row that must agree, for `Confidence.PATIENCE`.
    decay: how fast thresholds fall with the tokens generated (CALM uses 4); 0 keeps them.
    num_top: alternatives whose log-probabilities are recorded per token.
  """

  threshold: float | Sequence[float]
  confidence: Confidence = Confidence.MAX_PROB
  layers: tuple[int, ...] | None = None
  patience: int = 2
  decay: float = 0.0
  num_top: int = 0

  def thresholds(self, config: ModelConfig) -> tuple[float, ...]:
    """One threshold per exit in use.

    Raises:
      UserError: a threshold outside [0, 1], or not one per exit.
    """
    num_exits = len(chosen_exits(config, self.layers))
    if np.ndim(self.threshold) == 0:
      return (_checked_threshold(self.threshold),) * num_exits
    values = tuple(cast(Sequence[float], self.threshold))
    if len(values) != num_exits:
      raise UserError(
        f'{len(values)} thresholds for {num_exits} exits: give one for all or one per exit'
      )
    return tuple(map(_checked_threshold, values))

  def _plan(
    self, config: ModelConfig, filling: Filling, pending_capacity: int, record: Record
  ) -> ExitPlan:
    if pending_capacity < 1:
      raise UserError(f'pending_capacity={pending_capacity} must be at least 1')
    self._check_measure()
    return ExitPlan(
      exits=chosen_exits(config, self.layers),
      num_layers=config.num_layers,
      confidence=self.confidence,
      patience=self.patience,
      decay=self.decay,
      filling=filling,
      pending_capacity=pending_capacity,
      lane_buckets=lane_buckets(pending_capacity),
      record=record,
      num_top=self.num_top,
    )

  def _check_measure(self) -> None:
    if self.patience < 1:
      raise UserError(f'patience={self.patience} must be at least 1')
    if not self.decay >= 0.0:
      raise UserError(f'decay={self.decay} must be 0 (thresholds stay) or more; CALM uses 4')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeferredExit(ThresholdExit):
  """Deep layers catch up later, exactly.

  The hidden state at the exit is kept. When a token of the row goes deep, only the deep layers run,
  over all kept tokens at once, so that every cached key is that of a full pass: tokens are those of
  a model that computes everything and takes the first confident exit (FREE, arXiv 2310.05424).

  Attributes:
    pending_capacity: tokens of a row that may wait; then they are filled even if nobody goes deep.
    record: what is recorded.
  """

  pending_capacity: int = 16
  record: Record = Record.DECISION

  def plan(self, config: ModelConfig) -> ExitPlan:
    """The static part.

    Raises:
      UserError: an exit that the model lacks, or a capacity below 1.
    """
    return self._plan(config, Filling.DEFERRED, self.pending_capacity, self.record)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecomputeExit(ThresholdExit):
  """Tokens that exited run again from the first layer, with those that follow, until one goes deep.

  EE-LLM's KV recomputation (arXiv 2312.04916, section 4.1). The same tokens as `DeferredExit` at
  the same thresholds, for more work: it is here to be compared with.

  Attributes:
    pending_capacity: tokens that may be owed; then a deep pass fills the caches, and the token that
      was chosen early stands.
    record: what is recorded.
  """

  pending_capacity: int = 16
  record: Record = Record.DECISION

  def plan(self, config: ModelConfig) -> ExitPlan:
    """The static part; raises as `DeferredExit.plan`."""
    return self._plan(config, Filling.RECOMPUTED, self.pending_capacity, self.record)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyStateExit(ThresholdExit):
  """Deep keys and values are made of the stream at the exit, at once (CALM, arXiv 2207.07061).

  Approximate: later tokens attend to keys that the model was not trained to see, and tokens may
  differ from those of `DeferredExit`. Nothing is ever owed.
  """

  def plan(self, config: ModelConfig) -> ExitPlan:
    """The static part; raises as `DeferredExit.plan`."""
    return self._plan(config, Filling.COPIED, 1, Record.DECISION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineExit(ThresholdExit):
  """Stages of a `pipeline` mesh axis: the next token starts while deep layers fill (EE-LLM, 4.2).

  The same tokens as `DeferredExit` at the same thresholds. A step is a tick of all stages at once, and
  a token takes as many ticks as the stage of its exit is deep, whatever was skipped before it. Used
  under the mesh that it is to run on; parameters and caches of a stage lie on its devices alone.

  Attributes:
    layers_per_stage: layers of each stage; None cuts evenly. A cut right behind an exit makes its
      tokens pass one stage less.
  """

  layers_per_stage: tuple[int, ...] | None = None

  def plan(self, config: ModelConfig) -> PipelinePlan:
    """The static part, for the ambient mesh.

    Raises:
      UserError: no mesh, one that shares heads over `tensor`, more stages than layers, an exit that
        the model lacks.
    """
    self._check_measure()
    exits = chosen_exits(config, self.layers)
    stages = plan_stages(config, num_stages=_num_stages(), layers_per_span=self.layers_per_stage)
    return PipelinePlan(
      exits=exits,
      num_layers=config.num_layers,
      confidence=self.confidence,
      patience=self.patience,
      decay=self.decay,
      num_top=self.num_top,
      stages=StagedPlacement(stages=stages, exits=exits),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculative:
  """Drafts with the first layers and verifies with the rest: the tokens of full depth, sooner.

  Where to draft and how far is chosen before every round from what exits have agreed on lately and
  what rounds cost (DEL, arXiv 2504.05598); exits that do not help are left alone.

  Attributes:
    exit_layer: drafts after this layer always; None chooses. Needs `num_drafts`.
    num_drafts: drafts of every round; None chooses. Needs `exit_layer`.
    max_drafts: most drafts of a round.
    layers: exits to choose from; None means all of the model's.
    acceptance: the rule for sampled rows.
    costs: what rounds cost here (`evaluate.measure_draft_costs`); None estimates it from the model's
      shape.
    forced: exit and drafts are read from the state: to measure what rounds cost.
    confidence: what is recorded of the scores that chose a token.
    pending_capacity: room for the waiting tokens of other plans for the same state.
    num_top: alternatives whose log-probabilities are recorded per token.
  """

  exit_layer: int | None = None
  num_drafts: int | None = None
  max_drafts: int = 7
  layers: tuple[int, ...] | None = None
  acceptance: Acceptance = Acceptance.COUPLED
  costs: DraftCosts | None = None
  forced: bool = False
  confidence: Confidence = Confidence.MAX_PROB
  pending_capacity: int = 1
  num_top: int = 0

  def plan(self, config: ModelConfig) -> DraftPlan:
    """The static part.

    Raises:
      UserError: a model without exits, an exit that it lacks, drafts out of range.
    """
    exits = chosen_exits(config, self.layers)
    if not exits:
      raise UserError('speculation drafts at exits, and this model has none: use full depth')
    if (self.exit_layer is None) != (self.num_drafts is None):
      raise UserError('exit_layer and num_drafts are given together, or both chosen while decoding')
    if self.confidence not in OF_SCORES:
      known = ', '.join(item.value for item in OF_SCORES)
      raise UserError(f'confidence={self.confidence.value} has no use in speculation: {known} have')
    most = self.max_drafts if self.num_drafts is None else self.num_drafts
    if not 1 <= most <= MAX_DRAFTS:
      raise UserError(f'{most} drafts a round are outside 1 to {MAX_DRAFTS}')
    fixed = None
    if self.exit_layer is not None and self.num_drafts is not None:
      (chosen,) = chosen_exits(config, (self.exit_layer,))
      if chosen not in exits:
        raise UserError(f'exit_layer={self.exit_layer} is not among layers={self.layers}')
      fixed = (exits.index(chosen), self.num_drafts)
    return DraftPlan(
      exits=exits,
      num_layers=config.num_layers,
      confidence=self.confidence,
      acceptance=self.acceptance,
      max_drafts=most,
      costs=self._costs(config, exits, most),
      lane_buckets=draft_buckets(most),
      fixed=fixed,
      forced=self.forced,
      pending_capacity=self.pending_capacity,
      num_top=self.num_top,
    )

  def _costs(
    self, config: ModelConfig, exits: tuple[ExitConfig, ...], max_drafts: int
  ) -> DraftCosts:
    if self.costs is None:
      return estimate_costs(config, exits, max_drafts=max_drafts)
    if [len(rounds) for rounds in self.costs.rounds] != [max_drafts] * len(exits):
      raise UserError(
        f'costs are of {len(self.costs.rounds)} exits, and drafting has {len(exits)} exits and up to '
        f'{max_drafts} drafts: measure them for the same'
      )
    return self.costs

  def thresholds(self, config: ModelConfig) -> tuple[float, ...]:
    """One that never exits for each exit."""
    return (1.0,) * len(chosen_exits(config, self.layers))


def chosen_exits(config: ModelConfig, layers: tuple[int, ...] | None) -> tuple[ExitConfig, ...]:
  """The model's exits after `layers`, by ascending layer; None means all.

  Raises:
    UserError: an exit that the model lacks.
  """
  if layers is None:
    return config.exits
  known = {item.layer: item for item in config.exits}
  for layer in layers:
    if layer not in known:
      listed = ', '.join(map(str, known)) or 'none'
      raise UserError(f'no exit at layer {layer}: the model has exits at layers {listed}')
  return tuple(known[layer] for layer in sorted(set(layers)))


def _checked_threshold(value: object) -> float:
  if not isinstance(value, SupportsFloat):
    raise UserError(f'threshold={value!r} is no number: give one in [0, 1]')
  if not 0.0 <= float(value) <= 1.0:
    raise UserError(f'threshold={value} is outside [0, 1]: 0 exits first, 1 never exits early')
  return float(value)


def _num_stages() -> int:
  sizes = mesh_sizes()
  if PIPELINE_AXIS not in sizes:
    raise UserError(
      'strategy=pipeline runs on a mesh with a pipeline axis, and there is none: load the model with '
      'mesh=MeshConfig(pipeline=2), or add --gin.MeshConfig.pipeline=2'
    )
  if sizes.get(TENSOR_AXIS, 1) > 1:
    raise UserError(
      f'mesh tensor={sizes[TENSOR_AXIS]}: strategy=pipeline has whole layers on each device: set '
      'tensor=1, or use strategy=deferred on this mesh'
    )
  return sizes[PIPELINE_AXIS]


def lane_buckets(capacity: int) -> tuple[int, ...]:
  """Powers of 4 below `capacity`, then `capacity`: few programs, and padding costs little.

  Deep layers read their weights once however many lanes there are, so a bucket that is 4 times too
  large is still far from 4 times too slow.
  """
  buckets = [1]
  while buckets[-1] * 4 < capacity:
    buckets.append(buckets[-1] * 4)
  return (*buckets, capacity) if capacity > 1 else (1,)
