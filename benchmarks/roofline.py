"""The least time that a decoding step can take on this machine, from rates measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from common import seconds_of

from exitax.models import ModelConfig, Params

SUM_BYTES = 512 << 20
MATMUL = 2048


def rate_measures() -> dict[str, Callable[[], float]]:
  """Seconds of summing `SUM_BYTES` and of one `MATMUL` product, in XLA and in torch."""
  ours, theirs = jnp.ones(SUM_BYTES // 4), torch.ones(SUM_BYTES // 4)
  square, their_square = jnp.ones((MATMUL, MATMUL)), torch.ones(MATMUL, MATMUL)
  sum_fn, matmul_fn = jax.jit(jnp.sum), jax.jit(jnp.matmul)
  acts: dict[str, Callable[[], Any]] = {
    'sum_xla': lambda: sum_fn(ours).block_until_ready(),
    'sum_torch': lambda: theirs.sum().item(),
    'matmul_xla': lambda: matmul_fn(square, square).block_until_ready(),
    'matmul_torch': lambda: their_square @ their_square,
  }
  for act in acts.values():
    act()
  return {name: lambda act=act: seconds_of(act) for name, act in acts.items()}


def measured_rates(seconds: Mapping[str, list[float]]) -> list[tuple[float, float]]:
  """Bytes/s and flop/s of each round of `rate_measures`, the better library's each."""
  sums = [min(pair) for pair in zip(seconds['sum_xla'], seconds['sum_torch'], strict=True)]
  matmuls = [min(p) for p in zip(seconds['matmul_xla'], seconds['matmul_torch'], strict=True)]
  return [(SUM_BYTES / a, 2 * MATMUL**3 / b) for a, b in zip(sums, matmuls, strict=True)]


def step_bound(
  config: ModelConfig,
  params: Params,
  *,
  rows: Sequence[tuple[float, int]],
  bandwidth: float,
  matmul_rate: float,
) -> float:
  """Least seconds of a float32 step at full depth: weights, and keys that exist, are read once.

  Args:
    config: the model.
    params: what a step at full depth reads.
    rows: of each row, its keys (mean over the steps) and the tokens that read them.
    bandwidth: bytes/s.
    matmul_rate: flop/s.
  """
  cfg = config
  weights = sum(leaf.size for leaf in jax.tree.leaves(params))
  cached = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * sum(keys for keys, _ in rows)
  tokens, pairs = sum(lanes for _, lanes in rows), sum(keys * lanes for keys, lanes in rows)
  attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim * pairs
  return max(4 * (weights + cached) / bandwidth, (2 * weights * tokens + attention) / matmul_rate)
