"""The gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from exitax.layers.config import BlockConfig
from exitax.layers.joined import apply_linears
from exitax.layers.linear import Linear


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up`, keeping nothing but its arguments for the gradient; dtype kept.

  Autodiff keeps the sigmoid and the silu as well: the widest activations of a model, twice more.
  """
  return _gated_forward(gate, up)[0]


def _gated_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
  return (_silu(gate) * up).astype(up.dtype), (gate, up)


def _gated_backward(arguments: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  gate, up = arguments
  wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
  sigmoid = nn.sigmoid(wide)
  slope = sigmoid * (1 + wide * (1 - sigmoid))
  gradient = gradient.astype(wide.dtype)
  return (gradient * up * slope).astype(gate.dtype), (gradient * wide * sigmoid).astype(up.dtype)


def _silu(x: jax.Array) -> jax.Array:
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return wide * nn.sigmoid(wide)


gated.defvjp(_gated_forward, _gated_backward)


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
        lora=cfg.lora,
        name=name,
      )

    down = Linear(
      features=(cfg.embed_dim,),
      axes_in=('mlp',),
      axes_out=('embed',),
      precision=cfg.precision,
      init_std=cfg.residual_init_std,
      lora=cfg.lora,
      name='down',
    )
    gate, up = apply_linears(self, x, (wide('gate'), wide('up')))
    return down(gated(gate, up))
