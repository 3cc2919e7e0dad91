"""Muon (Jordan and others, 2024): momentum made orthogonal, for the matrices of blocks and heads."""

from __future__ import annotations

from typing import Any

import jax
import optax

from exitax.training.optimizer import OptimizerConfig

# Root mean square of an update's entries, so that AdamW's learning rates serve (arXiv 2502.16982, section 2.2).
_RMS = 0.2


def muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  """An `OptimizerConfig.chain`: Muon for kernels, AdamW (Nesterov's) for embeddings, norms and adapters.

  A kernel is one matrix from all of its inputs to all of its outputs, heads together; layers of a stack are matrices
  of their own. A step costs a few more products of the size of the weights. Kernels alone decay. `beta1` is AdamW's alone:
  momentum is 0.95.
  """
  chain = optax.contrib.muon(
    schedule,
    weight_decay=config.weight_decay,
    eps=config.epsilon,
    adam_b1=config.beta1,
    adam_b2=config.beta2,
    consistent_rms=_RMS,
    muon_weight_dimension_numbers=_dimensions,
  )
  if not config.clip_norm:
    return chain
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), chain)


def _dimensions(params: Any) -> Any:
  """Which axes of each leaf are inputs and outputs; None where AdamW is used."""

  def of(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    *_, kind, name = (None, *(key.key for key in path if hasattr(key, 'key')))
    if name != 'kernel':
      return None
    last = leaf.ndim - 1
    if kind in ('query', 'key', 'value'):  # [..., embed, heads, head_dim]
      return optax.contrib.MuonDimensionNumbers(last - 2, (last - 1, last))
    if kind == 'output':  # [..., heads, head_dim, embed]
      return optax.contrib.MuonDimensionNumbers((last - 2, last - 1), last)
    return optax.contrib.MuonDimensionNumbers(last - 1, last)

  return jax.tree_util.tree_map_with_path(of, params)
