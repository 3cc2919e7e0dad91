"""Flax modules: parameters and layer math, nothing else.

Caches, loops and schedules are plain functions elsewhere; modules name logical axes only.
"""

# Configuration.
# Modules.
from exitax.layers import platform
from exitax.layers.attention import AttendFn, Attention
from exitax.layers.block import Block, constrain_stream
from exitax.layers.causal import causal_attention
from exitax.layers.config import BlockConfig, Precision
from exitax.layers.dropout import DropFn, DropSite, drop_nothing, drop_units, keep_mask
from exitax.layers.embedding import VocabMatrix, embed_tokens, vocab_logits
from exitax.layers.exit_head import ExitHead, HeadKind
from exitax.layers.int8 import Int8, quantise, quantise_matrices, split_scale
from exitax.layers.joined import join_linears
from exitax.layers.kernels import (
  MASKED_LOGIT,
  cached_attention,
  dot_product_attention,
  ragged_attention,
  turned_attention,
)
from exitax.layers.linear import Linear, contract, project
from exitax.layers.lora import LORA_LEAVES, LoraConfig, merge_lora
from exitax.layers.mlp import SwiGLU
from exitax.layers.norm import RMSNorm, rms_normalise
from exitax.layers.rotary import (
  RopeConfig,
  RopeScaling,
  Rotary,
  attention_temperature,
  inverse_frequencies,
  make_rotary,
  rotate,
)
from exitax.layers.sharing import PROMPT, Origin, sharing_mask
from exitax.layers.splash import fuses_attention, splash_attention

__all__ = [
  'PROMPT',
  'Origin',
  'sharing_mask',
  'MASKED_LOGIT',
  'AttendFn',
  'Attention',
  'Block',
  'BlockConfig',
  'DropFn',
  'DropSite',
  'ExitHead',
  'HeadKind',
  'Int8',
  'Linear',
  'Precision',
  'RMSNorm',
  'RopeConfig',
  'RopeScaling',
  'Rotary',
  'attention_temperature',
  'SwiGLU',
  'VocabMatrix',
  'cached_attention',
  'ragged_attention',
  'turned_attention',
  'causal_attention',
  'constrain_stream',
  'contract',
  'dot_product_attention',
  'drop_nothing',
  'drop_units',
  'embed_tokens',
  'fuses_attention',
  'inverse_frequencies',
  'LORA_LEAVES',
  'LoraConfig',
  'join_linears',
  'merge_lora',
  'keep_mask',
  'make_rotary',
  'platform',
  'project',
  'quantise',
  'quantise_matrices',
  'rms_normalise',
  'rotate',
  'splash_attention',
  'split_scale',
  'vocab_logits',
]
