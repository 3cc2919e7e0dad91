"""Where layers and caches lie when every device runs all layers: the placement of most plans."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from exitax.decode.cache import KVCache, init_cache
from exitax.decode.lanes import Visibility
from exitax.decode.loop import prefill_chunk
from exitax.decode.plan import Placement, StepPlan
from exitax.decode.prepare import WeightFormat, prepare_params
from exitax.decode.state import DecodeState
from exitax.layers import HeadKind
from exitax.models import ExitConfig, ExitLM, ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class LocalPlacement:
  """A `Placement` on one device, or over `data` and `tensor` as the ambient rules say."""

  steps_per_token: int = 1

  def prepare_params(
    self, model: ExitLM, params: Params, *, weights: WeightFormat = WeightFormat.COMPUTE
  ) -> Params:
    """See the function of that name."""
    return prepare_params(model, params, weights=weights)

  def init_cache(
    self, config: ModelConfig, *, rows: int, capacity: int, head_layers: tuple[int, ...]
  ) -> KVCache:
    """An entry per layer."""
    return init_cache(config, rows=rows, capacity=capacity, head_layers=head_layers)

  def init_pending(
    self, config: ModelConfig, plan: StepPlan, *, rows: int
  ) -> tuple[jax.Array, ...]:
    """For each segment after the first, `[rows, pending_capacity, embed]`."""
    shape = (rows, plan.pending_capacity, config.embed_dim)
    return tuple(jnp.zeros(shape, config.precision.dtype) for _ in plan.segments[1:])

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
    """Chunk after chunk."""
    for _ in range(num_chunks):
      state = prefill_chunk(model, params, state, chunk=chunk, visibility=visibility)
    return state


LOCAL = LocalPlacement()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalPlan:
  """What plans share whose layers lie where the caller is.

  Attributes:
    exits: the exits in use, by ascending layer.
    num_layers: layers of the model.
  """

  exits: tuple[ExitConfig, ...]
  num_layers: int

  @property
  def placement(self) -> Placement:
    """Every device runs all layers."""
    return LOCAL

  @property
  def segments(self) -> tuple[range, ...]:
    """Spans of layers between exits: `[0:l1], [l1:l2], ..., [ln:L]`."""
    cuts = (0, *(item.layer for item in self.exits), self.num_layers)
    return tuple(range(a, b) for a, b in itertools.pairwise(cuts))

  @property
  def head_layers(self) -> tuple[int, ...]:
    """Layers of the exits whose heads cache keys of their own."""
    return tuple(item.layer for item in self.exits if item.head is HeadKind.LAYER)
