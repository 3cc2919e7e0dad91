"""Everything that decides a training run, as frozen data."""

from __future__ import annotations

import dataclasses

from exitax.checkpoint import CheckpointConfig
from exitax.data import DataConfig
from exitax.errors import UserError
from exitax.models import DropoutConfig, ModelConfig
from exitax.objectives import ObjectiveConfig
from exitax.parallel import MeshConfig, ShardingRules
from exitax.training.optimizer import OptimizerConfig
from exitax.training.pipeline import PipelineConfig

# The checkpoints kept as best are those with the lowest held-out loss of the final layer.
BEST_METRIC = 'held_out/final/nll'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
  """What happens when.

  Attributes:
    train_steps: optimizer steps of the whole run.
    seed: decides the initial parameters.
    accumulation_steps: parts that each batch is cut into, one after the other.
    log_period: steps between lines of metrics.
    eval_period: steps between held-out evaluations; 0 evaluates at the end only.
    eval_rows: rows of held-out text per evaluation, spread over all of it; None takes all.
    checkpoint_period: steps between checkpoints; one is always written at the end.
    profile_start: first step of the profiler's window.
    profile_steps: its length; 0 does not profile.
    max_loss_ratio: the run counts as diverged when the final layer's loss exceeds this multiple
      of ln(vocab_size), the loss of guessing.
    initial_checkpoint: a model directory whose parameters start the run, if MODEL_DIR has no
      checkpoint of its own.
  """

  train_steps: int
  seed: int = 0
  accumulation_steps: int = 1
  log_period: int = 10
  eval_period: int = 0
  eval_rows: int | None = 256
  checkpoint_period: int = 100
  profile_start: int = 10
  profile_steps: int = 0
  max_loss_ratio: float = 3.0
  initial_checkpoint: str | None = None

  def __post_init__(self) -> None:
    for name in ('train_steps', 'accumulation_steps', 'log_period', 'checkpoint_period'):
      if getattr(self, name) < 1:
        raise UserError(f'{name}={getattr(self, name)} must be at least 1')
    for name in ('eval_period', 'profile_start', 'profile_steps', 'seed'):
      if getattr(self, name) < 0:
        raise UserError(f'{name}={getattr(self, name)} is negative: choose 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """A whole run: what is trained, on what, how, and where.

  `pipeline` counts on meshes with more than one stage only.

  Raises:
    UserError: parts that do not fit each other.
  """

  model: ModelConfig
  data: DataConfig
  loop: LoopConfig
  objective: ObjectiveConfig = ObjectiveConfig()
  dropout: DropoutConfig = DropoutConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  sharding: ShardingRules = ShardingRules()
  pipeline: PipelineConfig = PipelineConfig()
  checkpoint: CheckpointConfig = CheckpointConfig(best_metric=BEST_METRIC)

  def __post_init__(self) -> None:
    self.objective.check(self.model.exits)
    if self.data.length > self.model.max_length:
      raise UserError(
        f'data length={self.data.length} exceeds the context max_length={self.model.max_length}: '
        'shorten the rows or lengthen the context'
      )
    if self.data.batch_size % self.loop.accumulation_steps:
      raise UserError(
        f'accumulation_steps={self.loop.accumulation_steps} does not divide '
        f'batch_size={self.data.batch_size}: choose a divisor'
      )
