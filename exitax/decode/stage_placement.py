"""Layers and caches over the `pipeline` mesh axis: no device holds another stage's.

Entries of all stages lie side by side on a sharded axis, so that inside `jax.shard_map` each device
finds its own in the shape that `extend` knows:

  parameters of a place  [stages, ...]                                  a stage's: [1, ...]
  cache of a place       [rows, stages * num_kv_heads, capacity, width] a stage's: [rows, num_kv_heads, ...]
  pending                [rows, stages, embed]                          a stage's: [rows, 1, embed]

Rows come first everywhere, as in every `DecodeState`, and lie over `data`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from exitax.decode.cache import KVCache, LayerCache, init_columns
from exitax.decode.compiling import decode_jit
from exitax.decode.lanes import Visibility, consecutive_lanes, mark_columns
from exitax.decode.plan import StepPlan
from exitax.decode.prepare import WeightFormat, cast_matrices, has_int8
from exitax.decode.stage_pass import Stage
from exitax.decode.stage_tables import StageTables
from exitax.decode.state import DecodeState
from exitax.errors import UserError
from exitax.layers import HeadKind, join_linears, merge_lora, quantise_matrices
from exitax.models import ExitLM, ModelConfig, Params, StagePlan, stack_spans
from exitax.parallel import PIPELINE_AXIS, ambient_spec, constrain

STAGES = 'stages'  # Where prepared parameters keep what is cut by stage.
_CACHE_AXES = ('batch', 'stage', None, None)
_STREAM_AXES = ('batch', 'stage', None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedPlacement(StageTables):
  """A `Placement` by stage, for programs that run under a mesh with that many stages."""

  @property
  def steps_per_token(self) -> int:
    """A token that exits nowhere passes every stage, one per step."""
    return self.num_stages

  def prepare_params(
    self, model: ExitLM, params: Params, *, weights: WeightFormat = WeightFormat.COMPUTE
  ) -> Params:
    """Layers and LAYER heads by stage, everything else whole on every device.

    Args:
      model: the model.
      params: stacked, after `decode.prepare_params`, or after this.
      weights: how matrices are kept.

    Raises:
      UserError: parameters that were prepared for other stages.
    """
    if STAGES not in params:
      return _arrange(params, model=model, tables=self, weights=weights)
    had = (jax.tree.leaves(params[STAGES])[0].shape[0], len(params[STAGES]['blocks']))
    if had != (self.num_stages, self.stages.max_layers):
      raise UserError(
        f'parameters were prepared for {had[0]} stages of up to {had[1]} layers, not for '
        f'{self.num_stages} of up to {self.stages.max_layers}: prepare them again'
      )
    return params

  def init_cache(
    self, config: ModelConfig, *, rows: int, capacity: int, head_layers: tuple[int, ...]
  ) -> KVCache:
    """An entry per place and, under `heads`, one per slot of LAYER heads, by its number."""
    del head_layers
    shape = (rows, self.num_stages * config.num_kv_heads, capacity, config.head_dim)

    def entry() -> LayerCache:
      return LayerCache(
        key=constrain(jnp.zeros(shape, config.precision.dtype), _CACHE_AXES),
        value=constrain(jnp.zeros(shape, config.precision.dtype), _CACHE_AXES),
      )

    return KVCache(
      layers=tuple(entry() for _ in range(self.stages.max_layers)),
      heads={slot: entry() for slot in range(self.num_head_slots)},
      columns=init_columns(rows, capacity),
    )

  def init_pending(
    self, config: ModelConfig, plan: StepPlan, *, rows: int
  ) -> tuple[jax.Array, ...]:
    """What each stage runs next; and the stream at the exit before it, if the measure reads that."""
    shape = (rows, self.num_stages, config.embed_dim)
    return tuple(
      constrain(jnp.zeros(shape, config.precision.dtype), _STREAM_AXES)
      for _ in range(2 if plan.confidence.reads_exit_before else 1)
    )

  def prefill(
    self,
    model: ExitLM,
    params: Params,
    state: DecodeState,
    *,
    num_chunks: int,
    chunk: int,
    visibility: Visibility,
  ) -> DecodeState:
    """Chunks follow each other through the stages: `num_chunks + num_stages - 1` ticks."""
    return _prefill(
      model, params, state, num_chunks, tables=self, chunk=chunk, visibility=visibility
    )


# Layout.


def own_params(params: Params) -> Params:
  """Inside `jax.shard_map`: this stage's parameters, `blocks` by place and `heads` by slot."""
  return jax.tree.map(lambda x: x[0], params[STAGES])


def params_specs(params: Params) -> Any:
  """Specs of prepared parameters."""

  def spec(path: Any, x: jax.Array) -> Any:
    first = ('stage',) if path[0].key == STAGES else (None,)
    return ambient_spec(x.shape, (*first, *(None,) * (x.ndim - 1))[: x.ndim])

  return jax.tree_util.tree_map_with_path(spec, params)


def rows_specs(tree: Any) -> Any:
  """Specs of arrays that have rows and nothing of a stage."""
  return jax.tree.map(lambda x: ambient_spec(x.shape, ('batch', *(None,) * (x.ndim - 1))), tree)


def staged_specs(tree: Any) -> Any:
  """Specs of cache entries and pending streams."""
  return jax.tree.map(
    lambda x: ambient_spec(x.shape, ('batch', 'stage', *(None,) * (x.ndim - 2))), tree
  )


@jax.jit(static_argnames=('model', 'tables', 'weights'))
def _arrange(
  params: Params, *, model: ExitLM, tables: StageTables, weights: WeightFormat
) -> Params:
  params = cast_matrices(model, merge_lora(params, model.config.lora))
  exits = {layer: dict(item) for layer, item in params.get('exits', {}).items()}
  layer_heads = {
    item.layer: exits[str(item.layer)].pop('head')
    for item in model.config.exits
    if item.head is HeadKind.LAYER
  }
  by_stage = {
    'blocks': _places(tables.stages, params['blocks']),
    'heads': tuple(
      _stack([layer_heads[item.layer] for item in slot]) for slot in tables.head_exits
    ),
  }
  whole = {name: part for name, part in params.items() if name not in ('blocks', 'exits')}
  if any(exits.values()):
    whole['exits'] = exits
  whole, by_stage = join_linears(whole), jax.vmap(join_linears)(by_stage)
  if weights is WeightFormat.INT8 and not has_int8(params):
    whole, by_stage = quantise_matrices(whole), jax.vmap(quantise_matrices)(by_stage)
  arranged = {**whole, STAGES: by_stage}
  return jax.tree.map(jax.lax.with_sharding_constraint, arranged, params_specs(arranged))


def _places(stages: StagePlan, blocks: Any) -> tuple[Params, ...]:
  """For each place, its block of every stage, `[stages, ...]`."""
  places = range(stages.max_layers)
  if isinstance(blocks, tuple):
    table = stages.layer_table[:, 0]
    return tuple(_stack([blocks[layer] for layer in table[:, place]]) for place in places)
  spans = stack_spans(stages, blocks)
  return tuple(jax.tree.map(lambda x, place=place: x[:, 0, place], spans) for place in places)


def _stack(trees: list[Params]) -> Params:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# Prefill.


@decode_jit(static=('model', 'tables', 'chunk', 'visibility'), donated=('state',))
def _prefill(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  num_chunks: jax.Array | int,
  *,
  tables: StageTables,
  chunk: int,
  visibility: Visibility,
) -> DecodeState:
  """Chunks of prompts through the stages; at tick t stage s runs chunk t - s, if there is one."""
  first = state.fill[:, 0]
  total = jnp.clip(state.prompt_length - 1 - first, 0, chunk * num_chunks)
  capacity = state.tokens.shape[1]
  columns = mark_columns(state.cache.columns, consecutive_lanes(first, total, num_lanes=capacity))

  def on_stage(params: Params, layers: Any, heads: Any, rows: Any, num_chunks: Any) -> Any:
    first, total, tokens, columns = rows
    number = jax.lax.axis_index(PIPELINE_AXIS)
    stage = Stage(model, tables, own_params(params), number, visibility)

    def tick(time: jax.Array, carry: Any) -> Any:
      layers, heads, received = carry
      done = (time - number) * chunk  # Tokens per row that the stage has run.
      busy = (time >= number) & (time - number < num_chunks)
      lanes = consecutive_lanes(
        first + done, jnp.where(busy, jnp.clip(total - done, 0, chunk), 0), num_lanes=chunk
      )
      embedded = model.embed(
        params, jnp.take_along_axis(tokens, lanes.position, axis=1, mode='clip')
      )
      hidden = jnp.where(number == 0, embedded, received)
      after = stage.run(hidden, lanes, layers=layers, heads=heads, columns=columns)
      return after.layers, after.heads, stage.hand_on(after.hidden)

    shape = (tokens.shape[0], chunk, model.config.embed_dim)
    received = jnp.zeros(shape, model.config.precision.dtype)
    num_ticks = num_chunks + tables.num_stages - 1
    return jax.lax.fori_loop(0, num_ticks, tick, (layers, heads, received))[:2]

  cache = state.cache
  rows = (first, total, state.tokens, columns)
  entries = (cache.layers, cache.heads)
  layers, heads = jax.shard_map(
    on_stage,
    in_specs=(params_specs(params), *staged_specs(entries), rows_specs(rows), None),
    out_specs=staged_specs(entries),
    check_vma=False,
  )(params, *entries, rows, jnp.asarray(num_chunks))
  return dataclasses.replace(
    state,
    cache=KVCache(layers=layers, heads=heads, columns=columns),
    fill=state.fill + total[:, None],
  )
