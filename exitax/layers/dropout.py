"""Dropout whose masks belong to rows of the global batch, wherever and whenever they are computed."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


class DropSite(enum.IntEnum):
  """Where something is dropped; the number is folded into the key, so that sites are independent."""

  EMBEDDING = 0  # The embedded tokens.
  ATTENTION = 1  # What attention adds to the residual stream.
  MLP = 2  # What the MLP adds to it.
  LAYER = 3  # All that a layer adds to it.


# Turns what a branch would add to the residual stream, `[..., embed]`, into what it adds.
DropFn = Callable[[jax.Array, DropSite], jax.Array]


def drop_nothing(output: jax.Array, site: DropSite) -> jax.Array:
  """The `DropFn` of decoding and evaluation."""
  del site
  return output


def keep_mask(
  key: jax.Array, rows: jax.Array, rate: jax.Array | float, shape: Sequence[int]
) -> jax.Array:
  """What is kept, each entry with probability `1 - rate`: bool `[batch, *shape]`.

  Row i of the mask depends on `key` and `rows[i]` alone: a batch that is cut, reordered or spread
  over devices gets the rows of the whole batch's mask. Draws are float32 whatever the model's
  precision, so precisions share masks.

  Args:
    key: typed key, scalar.
    rows: i32 `[batch]`, numbers of the rows in the global batch.
    rate: probability of dropping, a scalar in [0, 1).
    shape: of one row's mask.
  """
  kept = 1 - jnp.asarray(rate, jnp.float32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  return jax.vmap(lambda key: jax.random.bernoulli(key, kept, tuple(shape)))(keys)


def drop_units(x: jax.Array, key: jax.Array, rows: jax.Array, rate: float) -> jax.Array:
  """Zeroes entries of `x` `[batch, ...]` and divides the others by `1 - rate`: the mean stays.

  "Inverted" dropout (arXiv 1207.0580 scales at test time instead). The division is made in at least
  float32; the dtype is kept. Autodiff keeps the mask, one byte an entry.
  """
  mask = keep_mask(key, rows, rate, x.shape[1:])
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jnp.where(mask, (wide / (1 - rate)).astype(x.dtype), jnp.zeros_like(x))
