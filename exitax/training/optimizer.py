"""The optimizer: AdamW behind a warm-up and decay schedule, as an optax chain."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import optax

from exitax.errors import UserError, choose
from exitax.parallel import path_name

ChainFn = Callable[['OptimizerConfig', optax.Schedule], optax.GradientTransformation]


class Decay(enum.Enum):
  """Shape of the learning rate after warm-up."""

  COSINE = 'cosine'
  LINEAR = 'linear'
  CONSTANT = 'constant'


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Learning rate schedule and AdamW (arXiv 1711.05101).

  Attributes:
    learning_rate: the peak, reached after warm-up.
    final_learning_rate: at the last step; unused by a constant schedule.
    warmup_steps: optimizer steps of linear warm-up from 0.
    decay: shape between the peak and the last step.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: decoupled; norm scales and biases are left out.
    clip_norm: largest global norm of the gradient; 0 does not clip.
    chain: builds another optax transformation from this configuration and the schedule; None is
      clipping, then AdamW.
  """

  learning_rate: float = 1e-3
  final_learning_rate: float = 1e-4
  warmup_steps: int = 100
  decay: Decay = Decay.COSINE
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  chain: ChainFn | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, 'decay', choose(Decay, self.decay, name='OptimizerConfig.decay'))
    if self.learning_rate <= 0:
      raise UserError(f'learning_rate={self.learning_rate} must be positive')
    if self.warmup_steps < 0:
      raise UserError(f'warmup_steps={self.warmup_steps} is negative: choose 0 or more')
    if self.clip_norm < 0:
      raise UserError(f'clip_norm={self.clip_norm} is negative: choose 0 (off) or more')


def learning_rate_schedule(config: OptimizerConfig, *, train_steps: int) -> optax.Schedule:
  """Learning rate by optimizer step: linear warm-up, then decay until `train_steps`."""
  warmup = min(config.warmup_steps, train_steps)
  decay_steps = max(train_steps - warmup, 1)
  peak, final = config.learning_rate, config.final_learning_rate
  match config.decay:
    case Decay.COSINE:
      after = optax.cosine_decay_schedule(peak, decay_steps, alpha=final / peak)
    case Decay.LINEAR:
      after = optax.linear_schedule(peak, final, decay_steps)
    case Decay.CONSTANT:
      after = optax.constant_schedule(peak)
  if not warmup:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
  config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """The optax transformation that `config` describes."""
  if config.chain is not None:
    return config.chain(config, schedule)
  adamw = optax.adamw(
    schedule,
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )
  if not config.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decay_mask(params: Any) -> Any:
  """True for matrices, False for norm scales and biases: what weight decay applies to."""
  return jax.tree.map_with_path(
    lambda path, _: path_name(path).rsplit('/', 1)[-1] not in ('scale', 'bias'), params
  )
