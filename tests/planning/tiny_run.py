"""A run that plans of the tests are about."""

from __future__ import annotations

from typing import Any

from exitax.data import DataConfig
from exitax.models import ExitConfig, ExitMatrix, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig
from exitax.parallel import MeshConfig
from exitax.training import LoopConfig, PipelineConfig, RunConfig


def tiny_run(
  *,
  mesh: MeshConfig,
  pipeline: PipelineConfig | None = None,
  matrix: ExitMatrix = ExitMatrix.FINAL,
  batch_size: int = 16,
  accumulation_steps: int = 1,
  **model: Any,
) -> RunConfig:
  """Six layers of 32, exits after 2 and 4."""
  sizes = {
    'vocab_size': 64,
    'num_layers': 6,
    'embed_dim': 32,
    'num_heads': 4,
    'mlp_dim': 48,
    'max_length': 16,
    'exits': (ExitConfig(layer=2, matrix=matrix), ExitConfig(layer=4, matrix=matrix)),
  }
  return RunConfig(
    model=ModelConfig(**(sizes | model)),
    data=DataConfig(batch_size=batch_size, length=16),
    loop=LoopConfig(train_steps=10, accumulation_steps=accumulation_steps),
    objective=ObjectiveConfig(
      exit_weights=(ExitWeight(start=0.25), ExitWeight(start=0.5)), chunk_length=8
    ),
    mesh=mesh,
    pipeline=pipeline or PipelineConfig(num_microbatches=4),
  )
