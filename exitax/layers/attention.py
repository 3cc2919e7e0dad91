"""Grouped-query self-attention; where keys come from is the caller's business."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax

from exitax.layers.config import BlockConfig
from exitax.layers.joined import apply_linears
from exitax.layers.linear import Linear
from exitax.layers.norm import RMSNorm
from exitax.layers.rotary import Rotary, rotate
from exitax.parallel import constrain


class AttendFn(Protocol):
  """Turns the queries, keys and values of new tokens into mixed values.

  Training sees the keys of the same batch; decoding writes the keys to a cache and sees the cache.

  Args of the call:
    query: `[..., num_heads, head_dim]`, rotated.
    key: `[..., num_kv_heads, head_dim]`, rotated.
    value: `[..., num_kv_heads, head_dim]`.

  Returns:
    The mixed values, shaped like `query`, and whatever state the caller keeps (its layer cache, or
    None).
  """

  def __call__(
    self, query: jax.Array, key: jax.Array, value: jax.Array
  ) -> tuple[jax.Array, Any]: ...


class Attention(nn.Module):
  """Projections, optional q/k norms and rotation around a given `AttendFn`."""

  config: BlockConfig

  @nn.compact
  def __call__(self, hidden: jax.Array, rotary: Rotary, attend: AttendFn) -> tuple[jax.Array, Any]:
    """Mixes tokens.

    Args:
      hidden: `[..., embed]`, already normalised.
      rotary: angles of the tokens' positions, `[..., head_dim / 2]`.
      attend: mixes values; see `AttendFn`.

    Returns:
      `[..., embed]` to be added to the residual stream, and `attend`'s state.
    """
    cfg = self.config
    linears = (
      self._heads('query', cfg.num_heads, 'heads'),
      self._heads('key', cfg.num_kv_heads, 'kv_heads'),
      self._heads('value', cfg.num_kv_heads, 'kv_heads'),
    )
    query, key, value = (
      constrain_heads(x, linear.axes_out[0])
      for x, linear in zip(apply_linears(self, hidden, linears), linears, strict=True)
    )
    if cfg.qk_norm:
      query = RMSNorm(cfg.norm_epsilon, 'kv', name='query_norm')(query)
      key = RMSNorm(cfg.norm_epsilon, 'kv', name='key_norm')(key)
    mixed, state = attend(rotate(query, rotary), rotate(key, rotary), value)
    output = Linear(
      features=(cfg.embed_dim,),
      axes_in=('heads', 'kv'),
      axes_out=('embed',),
      precision=cfg.precision,
      init_std=cfg.residual_init_std,
      use_bias=cfg.output_bias,
      lora=cfg.lora,
      name='output',
    )
    return output(mixed), state

  def _heads(self, name: str, num_heads: int, axis: str) -> Linear:
    return Linear(
      features=(num_heads, self.config.head_dim),
      axes_in=('embed',),
      axes_out=(axis, 'kv'),
      precision=self.config.precision,
      init_std=self.config.init_std,
      use_bias=self.config.qkv_bias,
      lora=self.config.lora,
      name=name,
    )


def constrain_heads(x: jax.Array, axis: str) -> jax.Array:
  """Places `[batch, length, heads, kv]` activations; other ranks (flat tokens) are left alone."""
  return constrain(x, ('batch', 'length', axis, 'kv')) if x.ndim == 4 else x
