"""Everything that decides a training run, as frozen data."""

from __future__ import annotations

import dataclasses

from exitax.checkpoint import CheckpointConfig
from exitax.data import DataConfig, GroupDataConfig
from exitax.errors import UserError, choose
from exitax.layers import HeadKind
from exitax.models import DropoutConfig, ExitMatrix, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig
from exitax.parallel import MeshConfig, ShardingRules
from exitax.training.initial import InitialExits
from exitax.training.optimizer import OptimizerConfig
from exitax.training.pipeline import PipelineConfig
from exitax.training.trained import Trained

# The checkpoints kept as best are those with the lowest held-out loss of the final layer.
BEST_METRIC = 'held_out/final/nll'
# Matrices that belong to the backbone.
_READ = (ExitMatrix.INPUT, ExitMatrix.FINAL)


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
    initial_exits: how exits start that the initial checkpoint does not have: 'random' or 'copy'.
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
  initial_exits: InitialExits = InitialExits.RANDOM

  def __post_init__(self) -> None:
    initial = choose(InitialExits, self.initial_exits, name='LoopConfig.initial_exits')
    object.__setattr__(self, 'initial_exits', initial)
    for name in ('train_steps', 'accumulation_steps', 'log_period', 'checkpoint_period'):
      if getattr(self, name) < 1:
        raise UserError(f'{name}={getattr(self, name)} must be at least 1')
    for name in ('eval_period', 'profile_start', 'profile_steps', 'seed'):
      if getattr(self, name) < 0:
        raise UserError(f'{name}={getattr(self, name)} is negative: choose 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """A whole run: what is trained, on what, how, and where.

  `pipeline` counts on meshes with more than one stage only. `trained` is 'all', 'exits', 'lora' or
  'lora_and_exits'. Where a model is frozen, exits without given weights count 1 each, or, beside the final layer,
  as much as it together.

  Raises:
    UserError: parts that do not fit each other.
  """

  model: ModelConfig
  data: DataConfig | GroupDataConfig
  loop: LoopConfig
  objective: ObjectiveConfig = ObjectiveConfig()
  dropout: DropoutConfig = DropoutConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  sharding: ShardingRules = ShardingRules()
  pipeline: PipelineConfig = PipelineConfig()
  checkpoint: CheckpointConfig = CheckpointConfig(best_metric=BEST_METRIC)
  trained: Trained = Trained.ALL

  def __post_init__(self) -> None:
    object.__setattr__(self, 'trained', choose(Trained, self.trained, name='RunConfig.trained'))
    if self.trained is not Trained.ALL:
      self._check_tuning()
    if self.trained is Trained.EXITS:
      self._check_tuning_of_exits()
    if self.trained is not Trained.ALL and not self.objective.exit_weights:
      self._weigh_exits_evenly()
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

  def _check_tuning(self) -> None:
    name = f'trained={self.trained.value!r}'
    if not self.loop.initial_checkpoint:
      raise UserError(f'{name} needs LoopConfig.initial_checkpoint, the model to freeze')
    if self.trained in (Trained.LORA, Trained.LORA_AND_EXITS) and self.model.lora is None:
      raise UserError(f'{name} and the model has no adapters: give ModelConfig.lora')

  def _check_tuning_of_exits(self) -> None:
    if not self.model.exits:
      raise UserError("trained='exits' and the model has none: give ModelConfig.exits")
    if self.model.lora is not None:
      raise UserError("trained='exits' freezes the adapters too: leave ModelConfig.lora alone")
    if self.dropout != DropoutConfig():
      raise UserError(
        "trained='exits' drops nothing in the frozen model: leave DropoutConfig alone"
      )
    if self.objective.distillation:
      raise UserError(
        "trained='exits' runs no final layer to learn from: set distillation=0, or train more"
      )
    exits = self.model.exits
    if all(kind.head is HeadKind.EMBEDDING and kind.matrix in _READ for kind in exits):
      raise UserError(
        'these exits have no parameters of their own: choose another head, or the matrix own or shared'
      )

  def _weigh_exits_evenly(self) -> None:
    """Exits of a frozen model do not know of each other; beside the final layer they count as much as it, together."""
    num_exits = len(self.model.exits)
    start = 1.0 if self.trained is Trained.EXITS else 1.0 / max(num_exits, 1)
    even = (ExitWeight(start=start),) * num_exits
    object.__setattr__(self, 'objective', dataclasses.replace(self.objective, exit_weights=even))
