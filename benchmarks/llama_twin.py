"""The same Llama in transformers: weights copied from ours, and a training step in torch."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np
import torch
import transformers

from exitax.models import ModelConfig, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchMode:
  """One way of running a model in torch.

  Attributes:
    attention: transformers' `attn_implementation`.
    compiled: whether the model goes through `torch.compile`.
    bfloat16: whether the forward pass runs under autocast.
  """

  attention: str
  compiled: bool
  bfloat16: bool

  @property
  def name(self) -> str:
    """For tables."""
    return f'torch {self.attention}{" compiled" if self.compiled else ""}'


def make_llama(config: ModelConfig, params: Params, *, attention: str = 'sdpa') -> Any:
  """`LlamaForCausalLM` in float32 with the weights of a tied model of ours; its exits are left out."""
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.embed_dim,
      intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      max_position_embeddings=config.max_length,
      rms_norm_eps=config.norm_epsilon,
      tie_word_embeddings=True,
      bos_token_id=None,
      eos_token_id=None,
      pad_token_id=None,
      use_cache=False,
    ),
    attn_implementation=attention,
    dtype=torch.float32,
  )
  tensors = {
    name: torch.tensor(np.array(value)) for name, value in _weights(config, params).items()
  }
  missing, unexpected = model.load_state_dict(tensors, strict=False)
  if unexpected or set(missing) - {'lm_head.weight'}:
    raise RuntimeError(f'weights do not fit: missing {missing}, unexpected {unexpected}')
  model.tie_weights()
  return model


class TorchTrainer:
  """A training step in torch: forward, backward, AdamW (fused), as fast as this mode gets."""

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    targets: np.ndarray,
    *,
    mode: TorchMode,
    optimizer: dict[str, Any],
    weight_decay: float,
  ) -> None:
    self.mode = mode
    model = make_llama(config, params, attention=mode.attention).train()
    self.optimizer = make_adamw(model, optimizer, weight_decay)
    self.model = torch.compile(model) if mode.compiled else model
    self.first_losses: list[float] = []
    self.tokens, self.targets = torch.tensor(tokens).long(), torch.tensor(targets).long()

  def step(self) -> float:
    """One optimizer step; returns the loss before it."""
    autocast = torch.autocast('cpu', torch.bfloat16) if self.mode.bfloat16 else None
    self.optimizer.zero_grad(set_to_none=True)
    with autocast or contextlib.nullcontext():
      logits = self.model(input_ids=self.tokens).logits
      loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), self.targets.flatten())
    loss.backward()
    self.optimizer.step()
    return loss.item()


def make_adamw(
  model: torch.nn.Module, optimizer: dict[str, Any], weight_decay: float
) -> torch.optim.Optimizer:
  """Fused AdamW; norms are not decayed."""
  matrices = [p for p in model.parameters() if p.ndim > 1]
  scales = [p for p in model.parameters() if p.ndim == 1]
  groups = [
    {'params': matrices, 'weight_decay': weight_decay},
    {'params': scales, 'weight_decay': 0.0},
  ]
  return torch.optim.AdamW(groups, fused=True, **optimizer)


def _weights(config: ModelConfig, params: Params) -> dict[str, Any]:
  width = config.embed_dim
  weights = {
    'model.embed_tokens.weight': params['embed']['matrix'],
    'model.norm.weight': params['norm']['scale'],
  }
  for i in range(config.num_layers):
    block = jax.tree.map(lambda leaf, i=i: leaf[i], params['blocks'])
    attention, mlp, prefix = block['attention'], block['mlp'], f'model.layers.{i}.'
    for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v')):
      kernel = attention[ours]['kernel'].reshape(width, -1)
      weights[f'{prefix}self_attn.{theirs}_proj.weight'] = kernel.T
    weights[f'{prefix}self_attn.o_proj.weight'] = attention['output']['kernel'].reshape(-1, width).T
    for name in ('gate', 'up', 'down'):
      weights[f'{prefix}mlp.{name}_proj.weight'] = mlp[name]['kernel'].T
    weights[f'{prefix}input_layernorm.weight'] = block['attention_norm']['scale']
    weights[f'{prefix}post_attention_layernorm.weight'] = block['mlp_norm']['scale']
  return weights
