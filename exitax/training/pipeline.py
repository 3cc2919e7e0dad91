"""Gradients of a batch over a pipeline: the model, its objective and the executor put together."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from exitax.errors import UserError, choose
from exitax.models import Dropout, ExitLM, Params, Remat, StagePlan, plan_stages, stack_spans
from exitax.objectives import (
  ExitSums,
  LossSums,
  Microbatch,
  ObjectiveConfig,
  PackedBatch,
  SharedParams,
  SpanObjective,
  VocabPlacement,
  split_shared,
)
from exitax.parallel import (
  DATA_AXIS,
  PIPELINE_AXIS,
  TENSOR_AXIS,
  Keep,
  Schedule,
  ScheduleKind,
  ShardingRules,
  StageProgram,
  fill_bubbles,
  forward_schedule,
  gather_parameter,
  make_schedule,
  reduce_gradient,
  run_pipeline,
  tree_shardings,
)


class Recompute(enum.Enum):
  """What the backward of a stage computes again, from most memory to least."""

  NONE = 'none'  # Nothing: what it reads is kept for every microbatch in flight.
  SELECTIVE = 'selective'  # Everything but the results of weight products.
  LAYER = 'layer'  # Every layer, from its kept input.
  STAGE = 'stage'  # The whole stage, from its kept input.


def recompute_settings(recompute: Recompute) -> tuple[Keep, Remat]:
  """What the executor keeps, and what each layer's own backward computes again."""
  match recompute:
    case Recompute.NONE:
      return Keep.RESIDUALS, Remat.NONE
    case Recompute.SELECTIVE:
      return Keep.RESIDUALS, Remat.DOTS
    case Recompute.LAYER:
      return Keep.RESIDUALS, Remat.FULL
    case Recompute.STAGE:
      return Keep.INPUTS, Remat.NONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """How a step is run on a mesh with pipeline stages.

  Attributes:
    schedule: '1f1b', 'gpipe' or 'interleaved'.
    num_microbatches: parts that each data shard's rows are cut into.
    num_chunks: spans of layers per stage; above 1 for 'interleaved'.
    layers_per_span: layers of each span; None cuts evenly.
    recompute: 'none', 'selective', 'layer' or 'stage'.
    vocab: 'stage', or 'pipeline': all stages share the scores of every exit.
    gradient_dtype: format in which gradients are added up over devices, once a step: 'float32' or
      'bfloat16'. Each microbatch's gradient is added to a float32 sum in either.
    bubble_filling_ratio: how much longer a backward lasts than a forward; with it the bubble takes
      extra microbatches that run through the first stages only, for the exits there (EE-LLM). 0
      leaves the bubble empty.
  """

  schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
  num_microbatches: int = 8
  num_chunks: int = 1
  layers_per_span: tuple[int, ...] | None = None
  recompute: Recompute = Recompute.STAGE
  vocab: VocabPlacement = VocabPlacement.PIPELINE
  gradient_dtype: str = 'float32'
  bubble_filling_ratio: float = 0.0

  def __post_init__(self) -> None:
    for name, kind in (
      ('schedule', ScheduleKind),
      ('recompute', Recompute),
      ('vocab', VocabPlacement),
    ):
      value = choose(kind, getattr(self, name), name=f'PipelineConfig.{name}')
      object.__setattr__(self, name, value)
    if self.gradient_dtype not in ('float32', 'bfloat16'):
      raise UserError(
        f"PipelineConfig.gradient_dtype={self.gradient_dtype!r}: choose 'float32' or 'bfloat16'"
      )
    for name in ('num_microbatches', 'num_chunks'):
      if getattr(self, name) < 1:
        raise UserError(f'PipelineConfig.{name}={getattr(self, name)} must be at least 1')


@struct.dataclass
class _Views:
  """Parameters as stages read them.

  Attributes:
    stages: blocks `[stages, chunks, max_layers, ...]`.
    shared: everything else.
  """

  stages: Params
  shared: SharedParams


class PipelinedObjective:
  """Value and gradient of the objective over the stages of a mesh."""

  def __init__(
    self,
    model: ExitLM,
    mesh: Mesh,
    rules: ShardingRules,
    *,
    objective: ObjectiveConfig,
    pipeline: PipelineConfig,
    depth: int | None = None,
  ) -> None:
    """Plans the stages; with `depth` for the layers up to there and their exits alone.

    Raises:
      UserError: sizes that do not fit each other.
    """
    self._keep, remat = recompute_settings(pipeline.recompute)
    config = dataclasses.replace(model.config, remat=remat)
    self._model, self._mesh, self._rules = ExitLM(config), mesh, rules
    self._objective, self._config = objective, pipeline
    num_stages = mesh.shape[PIPELINE_AXIS]
    self.plan: StagePlan = plan_stages(
      config,
      num_stages=num_stages,
      num_chunks=pipeline.num_chunks,
      layers_per_span=pipeline.layers_per_span,
      depth=depth,
    )
    sizes = {
      'num_stages': num_stages,
      'num_microbatches': pipeline.num_microbatches,
      'num_chunks': pipeline.num_chunks,
    }
    self.schedule = self._filled(make_schedule(pipeline.schedule, **sizes))
    self._forward_schedule = forward_schedule(
      **sizes | {'num_microbatches': self.schedule.num_parts}
    )
    self._check_vocabulary()
    self._shardings = self._view_shardings()

  def value_and_grad(
    self,
    params: Params,
    batch: PackedBatch,
    exit_weights: jax.Array,
    dropout: Dropout | None = None,
  ) -> tuple[tuple[jax.Array, LossSums], Params]:
    """As `jax.value_and_grad(exit_objective, has_aux=True)`, for parameters with stacked blocks."""
    exits, grads = self._run(params, batch, exit_weights, self.schedule, dropout)
    sums = LossSums(exits=exits, tokens=jnp.sum(batch.weights))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    grads = jax.tree.map(lambda g, s: g.astype(s.dtype), grads, jax.eval_shape(self._views, shapes))
    (of_params,) = jax.linear_transpose(self._views, shapes)(grads)
    return (self._loss(exits, exit_weights), sums), of_params

  def score(self, params: Params, batch: PackedBatch) -> LossSums:
    """Sums of every exit, without gradients."""
    weights = jnp.ones(len(self._model.config.depths))
    exits, _ = self._run(params, batch, weights, self._forward_schedule)
    return LossSums(exits=exits, tokens=jnp.sum(batch.weights))

  def check_rows(self, num_rows: int) -> None:
    """Passes if every data shard's rows can be cut into microbatches.

    Raises:
      UserError: they cannot.
    """
    shards, parts = self._mesh.shape[DATA_AXIS], self.schedule.num_parts
    num_extras = len(self.schedule.extra_depths)
    extras = f' and {num_extras} in the bubble,' if num_extras else ''
    if num_rows % (shards * parts):
      raise UserError(
        f'PipelineConfig.num_microbatches={self._config.num_microbatches}{extras} x data={shards} '
        f'does not divide the {num_rows} '
        f'rows of a step: choose a batch_size that is a multiple of {shards * parts}, or fewer '
        'microbatches'
      )

  def _filled(self, schedule: Schedule) -> Schedule:
    ratio = self._config.bubble_filling_ratio
    if not ratio:
      return schedule
    if self._config.vocab is not VocabPlacement.STAGE:
      raise UserError(
        "PipelineConfig.bubble_filling_ratio needs vocab='stage': scores that all stages share keep "
        'every stage busy in every tick'
      )
    filled = fill_bubbles(
      schedule, backward_over_forward=ratio, min_depth=self.plan.stages_to_first_exit
    )
    if not filled.extra_depths:
      # An extra passes its stages twice before the first gradient comes back.
      deepest = (schedule.num_stages - 1) // 2
      fix = (
        f'place an exit no later than after layer {self.plan.cuts[deepest] - 1}, or '
        if deepest
        else ''
      )
      raise UserError(
        f'PipelineConfig.bubble_filling_ratio={ratio}: no microbatch fits the bubble of '
        f'{schedule.num_stages} stages and reaches an exit: {fix}set it to 0'
      )
    return filled

  def _check_vocabulary(self) -> None:
    size = self._model.config.vocab_size
    parts = self._mesh.shape[PIPELINE_AXIS] * self._mesh.shape[TENSOR_AXIS]
    if self._config.vocab is VocabPlacement.PIPELINE and size % parts:
      raise UserError(
        f'vocab_size={size} cannot be shared by pipeline x tensor = {parts} devices: choose a '
        f"multiple of {parts}, or PipelineConfig.vocab='stage'"
      )

  def _program(self) -> StageProgram:
    """What the stages compute."""
    span = SpanObjective(self._model, self.plan, self._objective, self._config.vocab, PIPELINE_AXIS)
    return StageProgram(span.run, span.loss, span.hidden_like)

  def _loss(self, exits: ExitSums, exit_weights: jax.Array) -> jax.Array:
    losses = exits.nll + self._objective.z_loss * exits.log_z_squared
    return jnp.sum(exit_weights * losses)

  def _run(
    self,
    params: Params,
    batch: PackedBatch,
    exit_weights: jax.Array,
    schedule: Schedule,
    dropout: Dropout | None = None,
  ) -> tuple[Any, Any]:
    """The sums that the program's losses make, over all devices, and the gradient of the views."""
    self.check_rows(batch.tokens.shape[0])
    shares = self._counted_shares(batch, schedule)
    exit_weights = exit_weights / shares
    views = self._views(_cast(params, self._model.config.precision.dtype))
    views = jax.tree.map(jax.lax.with_sharding_constraint, views, self._shardings)
    specs = jax.tree.map(lambda sharding: _manual(sharding.spec), self._shardings)
    rows = jax.tree.map(lambda x: PartitionSpec(DATA_AXIS), batch)
    whole = PartitionSpec()
    trains = bool(schedule.backward.busy.any())
    run = jax.shard_map(
      lambda *args: self._stage(schedule, *args),
      mesh=self._mesh,
      in_specs=(specs, rows, whole, _dropout_specs(dropout)),
      out_specs=(whole, specs if trains else None),
      axis_names={DATA_AXIS, PIPELINE_AXIS},
      check_vma=False,
    )
    sums, grads = run(views, batch, exit_weights, dropout)
    return jax.tree.map(lambda x: x / shares, sums), grads

  def _counted_shares(self, batch: PackedBatch, schedule: Schedule) -> jax.Array | float:
    """Share of the batch's tokens that each exit's loss is made of, f32 `[exits + 1]`.

    With partial microbatches some exits see more than others: a loss divided by its own count is
    an estimate of the same mean, so gradients stay unbiased (EE-LLM, appendix on bubble filling).
    """
    if not schedule.extra_depths:
      return 1.0
    span_of = {i: span for span, exits in enumerate(self.plan.exits) for i in exits}
    counts = np.ones((len(span_of), schedule.num_parts))
    for number, depth in enumerate(schedule.extra_depths, start=schedule.num_microbatches):
      for exit_index, span in span_of.items():
        counts[exit_index, number] = span < depth
    shards = self._mesh.shape[DATA_AXIS]
    wide = jnp.promote_types(self._model.config.precision.dtype, jnp.float32)
    by_part = batch.weights.astype(wide).reshape(shards, schedule.num_parts, -1).sum(axis=(0, 2))
    counted = jnp.sum(jnp.asarray(counts, wide) * by_part, axis=1)
    return jnp.maximum(counted, 1.0) / jnp.maximum(by_part.sum(), 1.0)

  def _stage(
    self,
    schedule: Schedule,
    views: _Views,
    batch: PackedBatch,
    exit_weights: jax.Array,
    dropout: Dropout | None,
  ) -> tuple[Any, Any]:
    """One stage of one data shard: gathers its parameters, runs its table, adds up."""
    specs = jax.tree.map(lambda sharding: _manual(sharding.spec), self._shardings)
    whole = jax.tree.map(lambda x, spec: gather_parameter(x, spec, axis=DATA_AXIS), views, specs)
    num_parts = schedule.num_parts
    microbatches = Microbatch(
      batch=jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), batch),
      exit_weights=jnp.broadcast_to(exit_weights, (num_parts, *exit_weights.shape)),
      dropout=_cut_dropout(dropout, num_parts),
    )
    result = run_pipeline(
      self._program(),
      schedule,
      jax.tree.map(lambda x: x[0], whole.stages),
      whole.shared,
      microbatches,
      axis=PIPELINE_AXIS,
      keep=self._keep,
    )
    sums = jax.tree.map(lambda x: jax.lax.psum(x, (DATA_AXIS, PIPELINE_AXIS)), result.sums)
    if result.params is None:
      return sums, None
    grads = _Views(stages=jax.tree.map(lambda x: x[None], result.params), shared=result.shared)
    return sums, jax.tree.map(self._reduce, grads, specs)

  def _reduce(self, gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    cut_by_stage = any(PIPELINE_AXIS in _as_tuple(names) for names in spec)
    axes = (DATA_AXIS,) if cut_by_stage else (PIPELINE_AXIS, DATA_AXIS)
    wire_dtype = gradient.dtype
    if self._config.gradient_dtype == 'bfloat16':
      if self._mesh.devices.flat[0].platform == 'cpu':
        # XLA on the CPU adds bfloat16 up in float32, and fails to compile it here: round first.
        gradient = jax.lax.reduce_precision(gradient, exponent_bits=8, mantissa_bits=7)
      else:
        wire_dtype = jnp.bfloat16
    return reduce_gradient(gradient, spec, axes=axes, wire_dtype=wire_dtype)

  def _views(self, params: Params) -> _Views:
    """Linear in the parameters, so that its transpose takes gradients back."""
    return _Views(
      stages=stack_spans(self.plan, params['blocks']),
      shared=split_shared(self._model, params, self._config.vocab),
    )

  def _view_shardings(self) -> _Views:
    params = self._model.abstract_params()
    axes = self._model.logical_axes()
    views = jax.eval_shape(self._views, params)

    def is_axes(node: Any) -> bool:
      return isinstance(node, tuple)

    blocks = jax.tree.map(
      lambda names: ('stage', None, None, *names[1:]), axes['blocks'], is_leaf=is_axes
    )
    shared = split_shared(self._model, axes, self._config.vocab)
    # A lookup in a table that is cut along its rows is not partitioned.
    shared.whole['embed'] = {'matrix': (None, 'embed')}
    parts = jax.tree.map(lambda names: ('vocab_part', 'embed'), shared.parts, is_leaf=is_axes)
    logical = _Views(stages=blocks, shared=SharedParams(whole=shared.whole, parts=parts))
    return tree_shardings(views, logical, self._mesh, self._rules)


def _cast(params: Params, dtype: Any) -> Params:
  """Matrices in the compute dtype: half of what is gathered and read in bfloat16."""

  def cast(path: Any, leaf: jax.Array) -> jax.Array:
    return leaf.astype(dtype) if path[-1].key in ('kernel', 'matrix') else leaf

  return jax.tree.map_with_path(cast, params)


def _dropout_specs(dropout: Dropout | None) -> Dropout | None:
  """Rows lie where the batch's do; the rest is whole everywhere."""
  if dropout is None:
    return None
  whole: Any = jax.tree.map(lambda x: PartitionSpec(), dropout)
  return dataclasses.replace(whole, rows=PartitionSpec(DATA_AXIS))


def _cut_dropout(dropout: Dropout | None, num_parts: int) -> Dropout | None:
  """For each microbatch, every leaf `[num_parts, ...]`."""
  if dropout is None:
    return None
  parts: Any = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_parts, *x.shape)), dropout)
  return dataclasses.replace(parts, rows=dropout.rows.reshape(num_parts, -1))


def _manual(spec: PartitionSpec) -> PartitionSpec:
  """The part of a spec that names manual axes; the compiler keeps the rest."""
  entries = []
  for names in spec:
    kept = tuple(name for name in _as_tuple(names) if name in (DATA_AXIS, PIPELINE_AXIS))
    entries.append(kept[0] if len(kept) == 1 else (kept or None))
  return PartitionSpec(*entries)


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if names is None else (names,) if isinstance(names, str) else names
