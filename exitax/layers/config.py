"""What a transformer block is made of, as frozen data."""

from __future__ import annotations

import dataclasses
import enum

import jax.numpy as jnp
from jax.typing import DTypeLike

from exitax.layers.lora import LoraConfig
from exitax.layers.rotary import RopeConfig


class Precision(enum.Enum):
  """Number formats of a forward pass; parameters stay in float32 (the master weights).

  FLOAT32 computes everything in float32. BFLOAT16 runs matrix products on bfloat16 operands with
  float32 accumulation; norms, softmax and losses stay in float32.
  """

  FLOAT32 = 'float32'
  BFLOAT16 = 'bfloat16'
  FLOAT64 = 'float64'  # For oracles: needs `jax_enable_x64`.

  @property
  def dtype(self) -> DTypeLike:
    return jnp.dtype(self.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
  """One pre-norm block: grouped-query attention, then SwiGLU.

  Attributes:
    embed_dim: width of the residual stream.
    num_heads: query heads.
    num_kv_heads: key/value heads; divides `num_heads` (grouped-query attention, arXiv 2305.13245).
    head_dim: width of one head; independent of `embed_dim / num_heads` (Qwen3).
    mlp_dim: width of the gated hidden layer.
    norm_epsilon: added to the mean square in RMSNorm.
    rope: rotary position embedding.
    qk_norm: whether queries and keys pass an own RMSNorm per head (Qwen3).
    qkv_bias: whether q, k and v projections have biases (Qwen2).
    output_bias: whether the attention output projection has one (Llama's `attention_bias`).
    sliding_window: number of latest positions a query sees, itself included; None sees all.
    init_std: standard deviation of the weights' normal initialisation.
    residual_init_std: the same for the two projections that write to the residual stream.
    precision: formats of the computation.
    lora: adapters of the linear maps; None has none.
  """

  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  norm_epsilon: float = 1e-5
  rope: RopeConfig = RopeConfig()
  qk_norm: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  sliding_window: int | None = None
  init_std: float = 0.02
  residual_init_std: float = 0.02
  precision: Precision = Precision.FLOAT32
  lora: LoraConfig | None = None
