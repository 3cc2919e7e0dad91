"""The training step that benchmarks measure: one shape, one batch, exitax's own step function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import seconds_of

from exitax.data import Batch
from exitax.models import ExitLM, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig
from exitax.training import OptimizerConfig, TrainState, make_optimizer, make_train_step

# 27.8M parameters.
CONFIG = ModelConfig(
  vocab_size=4096, num_layers=8, embed_dim=512, num_heads=8, mlp_dim=1408, max_length=256
)
LENGTH, BATCH = 256, 8
LEARNING_RATE = 1e-3
OPTIMIZER = OptimizerConfig(clip_norm=0.0)  # Plain AdamW.
# The same for `torch.optim.AdamW`; weight decay is for matrices alone.
TORCH_OPTIMIZER: dict[str, Any] = {
  'lr': LEARNING_RATE,
  'betas': (OPTIMIZER.beta1, OPTIMIZER.beta2),
  'eps': OPTIMIZER.epsilon,
}
EXIT_WEIGHT = 0.3  # Of every exit's loss, beside 1 for the final one.


class OurTrainer:
  """exitax's training step, compiled, its state donated."""

  def __init__(self, config: ModelConfig, params: Any, batch: Batch) -> None:
    self.config = config
    schedule = optax.constant_schedule(LEARNING_RATE)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    objective = ObjectiveConfig(exit_weights=(ExitWeight(start=EXIT_WEIGHT),) * len(config.exits))
    step = make_train_step(ExitLM(config), optimizer, objective=objective, schedule=schedule)
    params = jax.tree.map(jnp.copy, params)
    self._state = TrainState(
      step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
    )
    self._batch = jax.device_put(batch)
    self.compile_seconds = seconds_of(lambda: self._compile(step))

  @property
  def temporary_bytes(self) -> int:
    """What a step allocates at its peak, beside its arguments and results."""
    analysis = self._program.memory_analysis()
    if analysis is None:
      raise RuntimeError('this backend does not report memory')
    return analysis.temp_size_in_bytes

  def step(self) -> float:
    """One optimizer step; returns the final exit's mean loss before it."""
    self._state, metrics = self._program(self._state, self._batch)
    jax.block_until_ready(self._state)
    return float(metrics.sums.exits.nll[-1] / metrics.sums.tokens)

  def _compile(self, step: Callable[..., Any]) -> None:
    self._program = jax.jit(step, donate_argnums=0).lower(self._state, self._batch).compile()


def make_batch(
  batch_size: int, *, length: int = LENGTH, vocab_size: int = CONFIG.vocab_size
) -> Batch:
  """Random tokens, one document a row."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab_size, (batch_size, length + 1)).astype(np.int32)
  shape = (batch_size, length)
  return Batch(
    tokens=tokens[:, :-1].copy(),
    targets=tokens[:, 1:].copy(),
    segment_ids=np.ones(shape, np.int32),
    positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
    weights=np.ones(shape, np.float32),
  )
