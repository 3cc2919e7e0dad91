"""The gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

import flax.linen as nn
import jax

from exitax.layers.config import BlockConfig
from exitax.layers.linear import Linear


class SwiGLU(nn.Module):
  """`down(silu(gate(x)) * up(x))`."""

  config: BlockConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., embed]` to `[..., embed]`."""
    cfg = self.config

    def wide(name: str) -> Linear:
      return Linear(
        features=(cfg.mlp_dim,),
        axes_in=('embed',),
        axes_out=('mlp',),
        precision=cfg.precision,
        init_std=cfg.init_std,
        name=name,
      )

    gated = nn.silu(wide('gate')(x)) * wide('up')(x)
    down = Linear(
      features=(cfg.embed_dim,),
      axes_in=('mlp',),
      axes_out=('embed',),
      precision=cfg.precision,
      init_std=cfg.residual_init_std,
      name='down',
    )
    return down(gated)
