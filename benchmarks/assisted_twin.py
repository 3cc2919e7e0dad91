"""transformers' early-exit assisted generation with our weights."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from llama_twin import make_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from exitax.layers import HeadKind
from exitax.models import ExitMatrix, ModelConfig, Params


class AssistedLlama:
  """`generate`, plain or with `assistant_early_exit`.

  transformers reads the final norm at the exit. Ours have norms of their own, which were trained: so
  that both sides draft the same tokens, the final norm takes the exit's weights while it drafts.
  """

  def __init__(self, config: ModelConfig, params: Params) -> None:
    """Copies the weights.

    Raises:
      ValueError: exits of another kind.
    """
    for item in config.exits:
      if (item.head, item.matrix) != (HeadKind.NORM, ExitMatrix.FINAL):
        raise ValueError(f'the exit after layer {item.layer} is not a norm before the final matrix')
    self.model = make_llama(config, params).eval()
    self.model.config.use_cache = True
    scales = {
      item.layer: torch.tensor(np.array(params['exits'][str(item.layer)]['head']['norm']['scale']))
      for item in config.exits
    }
    backbone = self.model.model
    backbone.norm = _NormByDepth(backbone.norm, backbone.config, scales, config.norm_epsilon)

  def seconds(self, prompt: list[int], new_tokens: int, exit_layer: int | None) -> float:
    """Seconds of generating greedily, prompt included; `tokens` is what came out."""
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {} if exit_layer is None else {'assistant_early_exit': exit_layer}
    start = time.perf_counter()
    with torch.inference_mode():
      output = self.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        **settings,
      )
    seconds = time.perf_counter() - start
    self.tokens = output[0, len(prompt) :].tolist()
    return seconds


class _NormByDepth(torch.nn.Module):
  def __init__(
    self, final: torch.nn.Module, config: Any, scales: dict[int, torch.Tensor], epsilon: float
  ) -> None:
    super().__init__()
    self.final, self._config = final, config
    self._norms: dict[int, torch.nn.Module] = {}
    for layer, scale in scales.items():
      norm = LlamaRMSNorm(len(scale), eps=epsilon)
      norm.load_state_dict({'weight': scale})
      self._norms[layer] = norm

  def forward(self, hidden: torch.Tensor) -> torch.Tensor:
    return self._norms.get(self._config.num_hidden_layers, self.final)(hidden)
