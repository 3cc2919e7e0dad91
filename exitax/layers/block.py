"""The transformer block that every system shares: trained, decoded, grouped, served."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from exitax.layers.attention import AttendFn, Attention
from exitax.layers.config import BlockConfig
from exitax.layers.dropout import DropFn, DropSite, drop_nothing
from exitax.layers.mlp import SwiGLU
from exitax.layers.norm import RMSNorm
from exitax.layers.rotary import Rotary
from exitax.parallel import constrain


class Block(nn.Module):
  """Pre-norm block: `h + attention(norm(h))`, then `h + mlp(norm(h))`."""

  config: BlockConfig

  @nn.compact
  def __call__(
    self, hidden: jax.Array, rotary: Rotary, attend: AttendFn, drop: DropFn = drop_nothing
  ) -> tuple[jax.Array, Any]:
    """Runs the block.

    Args:
      hidden: residual stream `[..., embed]`.
      rotary: angles of the tokens' positions, `[..., head_dim / 2]`.
      attend: mixes values; see `AttendFn`.
      drop: residual dropout, in training.

    Returns:
      The residual stream after the block, and `attend`'s state.
    """
    cfg = self.config
    normed = RMSNorm(cfg.norm_epsilon, name='attention_norm')(hidden)
    mixed, state = Attention(cfg, name='attention')(normed, rotary, attend)
    hidden = constrain_stream(hidden + drop(mixed, DropSite.ATTENTION))
    normed = RMSNorm(cfg.norm_epsilon, name='mlp_norm')(hidden)
    output = SwiGLU(cfg, name='mlp')(normed)
    return constrain_stream(hidden + drop(output, DropSite.MLP)), state


def constrain_stream(hidden: jax.Array) -> jax.Array:
  """Places a `[batch, length, embed]` residual stream; flat tokens are left alone.

  Under sequence parallelism the length is split over the tensor axis here, between the regions
  that split heads and mlp.
  """
  if hidden.ndim != 3:
    return hidden
  return constrain(hidden, ('batch', 'activation_length', 'activation_embed'))
