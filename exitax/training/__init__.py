"""Training: configuration, the jitted step, the loop."""

# Pieces put together.
from exitax.training.assembly import Assembly, assemble

# Configuration.
from exitax.training.config import BEST_METRIC, LoopConfig, RunConfig

# What a person sees.
from exitax.training.display import ConsoleDisplay, Display, QuietDisplay

# Errors.
from exitax.training.health import DivergenceError
from exitax.training.metrics import read_metrics
from exitax.training.optimizer import (
  Decay,
  OptimizerConfig,
  learning_rate_schedule,
  make_optimizer,
)

# Pieces.
from exitax.training.pipeline import (
  PipelineConfig,
  PipelinedObjective,
  Recompute,
  recompute_settings,
)
from exitax.training.state import TrainState, abstract_state, init_state, state_shardings
from exitax.training.step import StepMetrics, make_train_step

# The loop.
from exitax.training.trainer import TrainResult, train

__all__ = [
  'Assembly',
  'BEST_METRIC',
  'ConsoleDisplay',
  'Decay',
  'Display',
  'DivergenceError',
  'LoopConfig',
  'OptimizerConfig',
  'PipelineConfig',
  'PipelinedObjective',
  'QuietDisplay',
  'Recompute',
  'RunConfig',
  'StepMetrics',
  'TrainResult',
  'TrainState',
  'abstract_state',
  'assemble',
  'init_state',
  'learning_rate_schedule',
  'make_optimizer',
  'make_train_step',
  'read_metrics',
  'recompute_settings',
  'state_shardings',
  'train',
]
