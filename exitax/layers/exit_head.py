"""What stands between a hidden state and a vocabulary matrix at an exit (EE-LLM, arXiv 2312.04916)."""

from __future__ import annotations

import enum
from typing import Any

import flax.linen as nn
import jax

from exitax.layers.attention import AttendFn
from exitax.layers.block import Block
from exitax.layers.config import BlockConfig
from exitax.layers.mlp import SwiGLU
from exitax.layers.norm import RMSNorm
from exitax.layers.rotary import Rotary


class HeadKind(enum.Enum):
  """Weight of an exit head, from light to heavy."""

  EMBEDDING = 'embedding'  # The vocabulary matrix alone.
  NORM = 'norm'  # Own RMSNorm before it.
  MLP = 'mlp'  # Own MLP with residual, then norm.
  LAYER = 'layer'  # Own transformer layer (with its own cache entry), then norm.


class ExitHead(nn.Module):
  """Maps the residual stream at an exit to the features that a vocabulary matrix reads."""

  config: BlockConfig
  kind: HeadKind

  @nn.compact
  def __call__(
    self, hidden: jax.Array, rotary: Rotary | None, attend: AttendFn | None
  ) -> tuple[jax.Array, Any]:
    """`[..., embed]` to `[..., embed]`, and `attend`'s state (None unless `kind` is LAYER).

    Only a LAYER head reads `rotary` and `attend`.
    """
    cfg, state = self.config, None
    if self.kind is HeadKind.EMBEDDING:
      return hidden, None
    if self.kind is HeadKind.MLP:
      normed = RMSNorm(cfg.norm_epsilon, name='mlp_norm')(hidden)
      hidden = hidden + SwiGLU(cfg, name='mlp')(normed)
    elif self.kind is HeadKind.LAYER:
      if rotary is None or attend is None:
        raise ValueError('a LAYER head needs rotary and attend')
      hidden, state = Block(cfg, name='block')(hidden, rotary, attend)
    return RMSNorm(cfg.norm_epsilon, name='norm')(hidden), state
