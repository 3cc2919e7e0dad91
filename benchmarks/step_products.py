"""The matrix products of a training step, timed alone: the bound that `train_step` is held to."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from common import seconds_of

from exitax.layers.causal import attention_blocks
from exitax.models import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductGroup:
  """Products that a step runs `count` times: run once by XLA and once by torch.

  Attributes:
    name: for tables.
    count: how often a step runs the group.
    flops: of the group, once.
    xla: runs the group.
    torch: runs the group.
  """

  name: str
  count: int
  flops: float
  xla: Callable[[], Any]
  torch: Callable[[], Any]


class StepProducts:
  """Forward, d_input and d_weight of every product of a step: weights, attention, vocabulary."""

  def __init__(self, config: ModelConfig, *, batch: int, length: int) -> None:
    cfg, rows = config, batch * length
    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layers = cfg.num_layers
    weights = {
      ('query, output', cfg.embed_dim, heads): 2 * layers,
      ('key, value', cfg.embed_dim, kv_heads): 2 * layers,
      ('gate, up', cfg.embed_dim, cfg.mlp_dim): 2 * layers,
      ('down', cfg.mlp_dim, cfg.embed_dim): layers,
      ('vocabulary', cfg.embed_dim, cfg.vocab_size): 1,
    }
    self.groups = [
      _weight_group(name, count, rows, size_in, size_out)
      for (name, size_in, size_out), count in weights.items()
    ]
    self.groups.append(_attention_group(cfg, batch, length))
    self._seconds: dict[tuple[str, str], list[float]] = {}
    for group in self.groups:
      group.xla()
      group.torch()

  @property
  def flops(self) -> float:
    """Of all products of a step."""
    return sum(group.count * group.flops for group in self.groups)

  def run_xla(self) -> float:
    """Runs every group once; returns the seconds of all products of a step at this rate."""
    return self._run('xla')

  def run_torch(self) -> float:
    """Likewise in torch."""
    return self._run('torch')

  def bound(self) -> float:
    """Seconds of all products of a step, the faster library taken for each group (medians)."""
    return sum(
      group.count
      * min(statistics.median(self._seconds[group.name, library]) for library in ('xla', 'torch'))
      for group in self.groups
    )

  def _run(self, library: str) -> float:
    total = 0.0
    for group in self.groups:
      seconds = seconds_of(getattr(group, library))
      self._seconds.setdefault((group.name, library), []).append(seconds)
      total += group.count * seconds
    return total


def _weight_group(name: str, count: int, rows: int, size_in: int, size_out: int) -> ProductGroup:
  x, w, g = _normal(rows, size_in), _normal(size_in, size_out), _normal(rows, size_out)

  def products(x: jax.Array, w: jax.Array, g: jax.Array) -> list[jax.Array]:
    return [x @ w, g @ w.T, jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))]

  tx, tw, tg = torch.tensor(x), torch.tensor(w.T.copy()), torch.tensor(g)
  return ProductGroup(
    name=name,
    count=count,
    flops=6.0 * rows * size_in * size_out,
    xla=_compiled(products, x, w, g),
    torch=lambda: (tx @ tw.T, tg @ tw, tg.T @ tx),
  )


def _attention_group(cfg: ModelConfig, batch: int, length: int) -> ProductGroup:
  """Six products per block of queries, on the keys that the block can see."""
  group = cfg.num_heads // cfg.num_kv_heads
  blocks = attention_blocks(length)
  arrays, flops = [], 0.0
  for start, stop in blocks:
    folded = (batch * cfg.num_kv_heads, group * (stop - start))
    query, gradient = _normal(*folded, cfg.head_dim), _normal(*folded, cfg.head_dim)
    weight, d_logits = _normal(*folded, stop), _normal(*folded, stop)
    key, value = (_normal(folded[0], stop, cfg.head_dim) for _ in range(2))
    arrays.append((query, gradient, weight, d_logits, key, value))
    flops += 12.0 * weight.size * cfg.head_dim

  def products(arrays: list[tuple[Any, ...]]) -> list[Any]:
    """The same operators mean the same in jax and in torch."""
    results = []
    for query, gradient, weight, d_logits, key, value in arrays:
      results += [query @ key.mT, gradient @ value.mT, weight @ value, d_logits @ key]
      results += [weight.mT @ gradient, d_logits.mT @ query]
    return results

  tensors = [tuple(map(torch.tensor, item)) for item in arrays]
  return ProductGroup(
    name='attention',
    count=cfg.num_layers,
    flops=flops,
    xla=_compiled(products, arrays),
    torch=lambda: products(tensors),
  )


def _compiled(function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
  placed = jax.device_put(arrays)
  program = jax.jit(function).lower(*placed).compile()
  return lambda: jax.block_until_ready(program(*placed))


def _normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)
