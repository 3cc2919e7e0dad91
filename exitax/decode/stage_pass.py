"""One stage of a pipeline: its layers and LAYER heads over a few lanes, inside `jax.shard_map`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.cache import KVCache, LayerCache
from exitax.decode.extend import cached_attend, extend
from exitax.decode.lanes import KeyColumns, Lanes, Visibility
from exitax.decode.segments import run_if
from exitax.decode.stage_tables import StageTables
from exitax.models import ExitLM, Params
from exitax.parallel import PIPELINE_AXIS


@struct.dataclass
class StagePass:
  """What a stage makes of some lanes; taps and features of exits that it lacks are stale.

  Attributes:
    hidden: `[rows, lanes, embed]`, the stream after the stage.
    layers: the stage's cache entries, by place.
    heads: those of its LAYER heads, by slot.
    taps: `[rows, lanes, embed]` for each of the stage's exits: the stream there.
    features: likewise for each LAYER head: what its vocabulary matrix reads.
  """

  hidden: jax.Array
  layers: tuple[LayerCache, ...]
  heads: dict[int, LayerCache]
  taps: tuple[jax.Array, ...]
  features: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage, with what it runs with.

  Attributes:
    model: the model.
    tables: how it is cut.
    params: this stage's parameters: `blocks` by place, `heads` by slot.
    number: i32 scalar, which stage this device is.
    visibility: which keys a lane sees.
  """

  model: ExitLM
  tables: StageTables
  params: Params
  number: jax.Array
  visibility: Visibility

  def run(
    self,
    hidden: jax.Array,
    lanes: Lanes,
    *,
    layers: tuple[LayerCache, ...],
    heads: dict[int, LayerCache],
    columns: KeyColumns,
  ) -> StagePass:
    """Extends the stage by some lanes; does nothing if none is valid.

    Args:
      hidden: `[rows, lanes, embed]`, the stream before the stage.
      lanes: where the tokens stand.
      layers: the stage's cache entries.
      heads: those of its LAYER heads.
      columns: what visibility looks at, the lanes marked.
    """
    nothing = jnp.zeros_like(hidden)
    before = StagePass(
      hidden=hidden,
      layers=layers,
      heads=heads,
      taps=(nothing,) * self.tables.exit_places.shape[1],
      features=(nothing,) * self.tables.num_head_slots,
    )
    return run_if(
      jnp.any(lanes.valid), lambda carry: self._run_places(carry, lanes, columns), before
    )

  def _run_places(self, carry: StagePass, lanes: Lanes, columns: KeyColumns) -> StagePass:
    stages = self.tables.stages
    taps_at = jnp.asarray(self.tables.exit_places)[self.number]
    heads_at = jnp.asarray(self.tables.head_places)[self.number]
    is_layer = jnp.asarray(stages.is_layer)[self.number]
    hidden, taps, at_heads = carry.hidden, carry.taps, carry.features
    cache = KVCache(layers=carry.layers, heads={}, columns=columns)
    for place in range(stages.max_layers):
      after = extend(
        self.model,
        self.params,
        cache,
        hidden,
        lanes,
        layers=range(place, place + 1),
        visibility=self.visibility,
      )
      cache = after.cache
      # Padding caches what nobody reads, and hands the stream on.
      hidden = after.hidden if stages.is_even else jnp.where(is_layer[place], after.hidden, hidden)
      taps = tuple(jnp.where(at == place, hidden, x) for at, x in zip(taps_at, taps, strict=True))
      at_heads = tuple(
        jnp.where(at == place, hidden, x) for at, x in zip(heads_at, at_heads, strict=True)
      )
    mask = self.visibility(lanes, columns)
    made = [self._run_head(slot, x, carry, lanes, mask) for slot, x in enumerate(at_heads)]
    return StagePass(
      hidden=hidden,
      layers=cache.layers,
      heads={slot: entry for slot, (_, entry) in enumerate(made)},
      taps=taps,
      features=tuple(features for features, _ in made),
    )

  def _run_head(
    self, slot: int, hidden: jax.Array, carry: StagePass, lanes: Lanes, mask: jax.Array
  ) -> tuple[jax.Array, LayerCache]:
    """The LAYER head in a slot; LAYER heads differ in their parameters alone."""
    any_exit = self.tables.head_exits[slot][0]
    params = {'exits': {str(any_exit.layer): {'head': self.params['heads'][slot]}}}
    return self.model.exit_features(
      params,
      any_exit,
      hidden,
      rotary=self.model.rotary(lanes.position, below=self.model.config.max_length),
      attend=cached_attend(carry.heads[slot], lanes, mask),
    )

  def hand_on(self, hidden: jax.Array) -> jax.Array:
    """What the stage before has; nothing comes to the first stage."""
    last = self.tables.num_stages - 1
    return jax.lax.ppermute(hidden, PIPELINE_AXIS, [(i, i + 1) for i in range(last)])
