"""A Llama with early exits in torch + transformers: layers of transformers, weights copied from ours."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from llama_twin import TorchMode, make_adamw, make_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from exitax.layers import HeadKind
from exitax.models import ExitMatrix, ModelConfig, Params


class EarlyExitLlama(torch.nn.Module):
  """Losses of a Llama whose exits read its vocabulary matrix through norms of their own."""

  def __init__(self, config: ModelConfig, params: Params, *, attention: str = 'sdpa') -> None:
    """Copies the weights.

    Raises:
      ValueError: exits of another kind.
    """
    super().__init__()
    for item in config.exits:
      if (item.head, item.matrix) != (HeadKind.NORM, ExitMatrix.FINAL):
        raise ValueError(f'the exit after layer {item.layer} is not a norm before the final matrix')
    self.llama = make_llama(config, params, attention=attention)
    self.exit_layers = [item.layer for item in config.exits]
    self.norms = torch.nn.ModuleList(
      LlamaRMSNorm(config.embed_dim, eps=config.norm_epsilon) for _ in config.exits
    )
    for layer, norm in zip(self.exit_layers, self.norms, strict=True):
      scale = np.array(params['exits'][str(layer)]['head']['norm']['scale'])
      norm.load_state_dict({'weight': torch.tensor(scale)})

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean loss of every exit, the final one's last."""
    model = self.llama.model
    hidden = model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    angles = model.rotary_emb(hidden, position_ids=positions)
    losses = []
    for number, layer in enumerate(model.layers, start=1):
      # Without a mask transformers asks for causal attention, for which torch has a flash kernel.
      hidden = layer(
        hidden, attention_mask=None, position_ids=positions, position_embeddings=angles
      )
      if number in self.exit_layers:
        norm = self.norms[self.exit_layers.index(number)]
        losses.append(self._loss(norm(hidden), targets))
    losses.append(self._loss(model.norm(hidden), targets))
    return torch.stack(losses)

  def _loss(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = self.llama.lm_head(features)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class TorchExitTrainer:
  """A training step of `EarlyExitLlama`: forward, backward, fused AdamW."""

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    targets: np.ndarray,
    *,
    mode: TorchMode,
    device: str,
    exit_weight: float,
    optimizer: dict[str, Any],
    weight_decay: float,
  ) -> None:
    self.mode = mode
    self._device = device
    model = EarlyExitLlama(config, params, attention=mode.attention).to(device).train()
    self._optimizer = make_adamw(model, optimizer, weight_decay)
    self._model = torch.compile(model) if mode.compiled else model
    weights = [exit_weight] * len(config.exits) + [1.0]
    self._weights = torch.tensor(weights, device=device)
    self._tokens, self._targets = (torch.tensor(ids).long().to(device) for ids in (tokens, targets))

  def step(self) -> float:
    """One optimizer step, waited for; returns the final exit's loss before it."""
    self._optimizer.zero_grad(set_to_none=True)
    autocast = torch.autocast(self._device, torch.bfloat16) if self.mode.bfloat16 else None
    with autocast or contextlib.nullcontext():
      losses = self._model(self._tokens, self._targets)
      loss = (losses * self._weights).sum()
    loss.backward()
    self._optimizer.step()
    # Read after all that was put on the stream before: it waits for the optimizer too.
    return losses[-1].item()
