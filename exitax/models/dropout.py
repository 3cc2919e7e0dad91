"""What training drops: residual and embedding dropout, and LayerSkip's layer dropout."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.errors import UserError
from exitax.layers import DropFn, DropSite, drop_nothing, drop_units, keep_mask

# Keeps the keys of masks apart from those of initial parameters with the same seed.
_DOMAIN = 0x64726F70


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutConfig:
  """What training steps drop. Evaluation and decoding never drop, and checkpoints do not depend on it.

  Layer dropout is LayerSkip's (arXiv 2404.16710, section 4.1.1): a layer maps the stream x of each
  row of a batch to

    x + M(p) f(x),  M(p) = 0 with probability p = S(t) D(l) p_max, else 1,

  independently by row, for layers l = 0 .. L-1 and steps t = 0 .. T-1 with

    D(l) = exp(l ln2 / (L-1)) - 1, which grows from 0 to 1: the first layer is never dropped,
    S(t) = 1, or with a curriculum exp(t ln2 / (T-1)) - 1, and 1 after it.

  A kept layer is *not* divided by 1 - p, as in the paper: what a layer adds while decoding is then
  what it added in training, and decoding to an exit or to the end runs a chain of layers that
  training ran as well. A dropped row passes through unchanged. Its layer is computed all the same
  and masked, because shapes in XLA do not depend on values: unlike the paper's implementation,
  layer dropout here saves no time.

  Exits read the stream as it was dropped; their heads, MLP and LAYER heads included, drop nothing:
  a head is there whenever its exit is used.

  Attributes:
    residual_rate: share of the entries that attention and MLP add to the stream that is dropped;
      the others are divided by one minus it.
    embedding_rate: the same for the embedded tokens.
    layer_rate: p_max, the rate of the last layer (at the end of the curriculum).
    curriculum_steps: T, usually the steps of the run; 0 is no curriculum, S(t) = 1.
    seed: decides, with step, layer, row of the batch and site, what is dropped.

  Raises:
    UserError: a rate outside [0, 1), a curriculum of one step, a negative number.
  """

  residual_rate: float = 0.0
  embedding_rate: float = 0.0
  layer_rate: float = 0.0
  curriculum_steps: int = 0
  seed: int = 0

  def __post_init__(self) -> None:
    for name in ('residual_rate', 'embedding_rate', 'layer_rate'):
      rate = getattr(self, name)
      if not 0 <= rate < 1:
        raise UserError(
          f'DropoutConfig.{name}={rate} is no rate of dropout: choose 0 (drop nothing) or more, '
          'below 1'
        )
    if self.curriculum_steps < 0 or self.curriculum_steps == 1:
      raise UserError(
        f'DropoutConfig.curriculum_steps={self.curriculum_steps} is no curriculum: choose 2 or '
        'more, or 0 for a constant rate'
      )
    if self.seed < 0:
      raise UserError(f'DropoutConfig.seed={self.seed} is negative: choose 0 or more')

  def layer_rates(self, step: jax.Array | int, num_layers: int) -> jax.Array:
    """Rates p of all layers at `step` (i32 scalar, 0 is the first): f32 `[num_layers]`."""
    growth = math.log(2) * np.arange(num_layers) / max(num_layers - 1, 1)
    rates = jnp.asarray(self.layer_rate * np.expm1(growth), jnp.float32)
    if not self.curriculum_steps:
      return rates
    progress = jnp.asarray(step, jnp.float32) / (self.curriculum_steps - 1)
    return rates * jnp.expm1(math.log(2) * jnp.clip(progress, 0.0, 1.0))

  def at(self, step: jax.Array | int, *, num_layers: int, num_rows: int) -> Dropout | None:
    """What the training step after `step` steps drops; None if it is nothing, whatever the step.

    Args:
      step: i32 scalar.
      num_layers: of the model.
      num_rows: rows of the global batch.
    """
    if not (self.residual_rate or self.embedding_rate or self.layer_rate):
      return None
    key = jax.random.fold_in(jax.random.key(self.seed), _DOMAIN)
    return Dropout(
      key=jax.random.fold_in(key, step),
      layer_rates=self.layer_rates(step, num_layers),
      rows=jnp.arange(num_rows, dtype=jnp.int32),
      config=self,
    )


@struct.dataclass
class Dropout:
  """What one training step drops from some rows of its batch.

  The mask of a site is a function of seed, step, site, layer and global row, all folded into the
  key, and of nothing else: not of mesh, schedule, microbatches, accumulation or recomputation. Cut
  `rows` as the batch is cut; the rest is the same for all parts.

  Attributes:
    key: typed key of the step, scalar.
    layer_rates: f32 `[num_layers]`, p of each layer.
    rows: i32 `[batch]`, numbers of the rows in the global batch.
    config: constant rates.
  """

  key: jax.Array
  layer_rates: jax.Array
  rows: jax.Array
  config: DropoutConfig = struct.field(pytree_node=False)

  def drop_embedding(self, hidden: jax.Array) -> jax.Array:
    """Embedding dropout of `[batch, length, embed]`."""
    return self._units(hidden, DropSite.EMBEDDING, layer=0, rate=self.config.embedding_rate)

  def in_layer(self, layer: jax.Array | int) -> DropFn:
    """Residual dropout of a layer (i32 scalar)."""
    if not self.config.residual_rate:
      return drop_nothing
    return functools.partial(self._units, layer=layer, rate=self.config.residual_rate)

  def drop_layer(self, layer: jax.Array | int, before: jax.Array, after: jax.Array) -> jax.Array:
    """Layer dropout: `after` the layer, or for dropped rows `before` it, `[batch, length, embed]`."""
    if not self.config.layer_rate:
      return after
    key, rate = self._key(DropSite.LAYER, layer), self.layer_rates[layer]
    return jnp.where(keep_mask(key, self.rows, rate, (1,) * (after.ndim - 1)), after, before)

  def _units(
    self, x: jax.Array, site: DropSite, *, layer: jax.Array | int, rate: float
  ) -> jax.Array:
    return drop_units(x, self._key(site, layer), self.rows, rate) if rate else x

  def _key(self, site: DropSite, layer: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(self.key, site), layer)


def with_rows(dropout: Dropout | None, rows: jax.Array | None) -> Dropout | None:
  """The same for other rows, a part of the batch; nothing stays nothing."""
  if dropout is None or rows is None:
    return None
  return dataclasses.replace(dropout, rows=rows)
