"""Training: configuration, the jitted step, the loop."""

# Pieces put together.
from exitax.training.assembly import Assembly, assemble

# Configuration.
from exitax.training.config import BEST_METRIC, LoopConfig, RunConfig

# What a person sees.
from exitax.training.display import ConsoleDisplay, Display, QuietDisplay

# Errors.
from exitax.training.health import DivergenceError

# Where parameters start.
from exitax.training.initial import InitialExits, copied_exits, initial_params
from exitax.training.metrics import read_metrics
from exitax.training.muon import muon
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
from exitax.training.pipelined_tuning import PipelinedTuning
from exitax.training.state import TrainState, abstract_state, init_state, state_shardings
from exitax.training.step import StepMetrics, make_train_step
from exitax.training.trained import Trained, join_trained, split_trained, trained_depth

# The loop.
from exitax.training.trainer import TrainResult, train

__all__ = [
  'Assembly',
  'BEST_METRIC',
  'ConsoleDisplay',
  'Decay',
  'Display',
  'DivergenceError',
  'InitialExits',
  'LoopConfig',
  'OptimizerConfig',
  'PipelineConfig',
  'PipelinedObjective',
  'PipelinedTuning',
  'QuietDisplay',
  'Recompute',
  'RunConfig',
  'StepMetrics',
  'TrainResult',
  'TrainState',
  'Trained',
  'abstract_state',
  'assemble',
  'copied_exits',
  'init_state',
  'initial_params',
  'join_trained',
  'learning_rate_schedule',
  'make_optimizer',
  'make_train_step',
  'muon',
  'read_metrics',
  'recompute_settings',
  'split_trained',
  'state_shardings',
  'train',
  'trained_depth',
]
