"""How much each exit's loss counts, as a function of the training step."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp

from exitax.errors import UserError, choose


class WeightCurve(enum.Enum):
  """Shape of the way from a weight's first to its last value."""

  CONSTANT = 'constant'
  LINEAR = 'linear'
  COSINE = 'cosine'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitWeight:
  """The weight w(t) of one exit's loss (EE-LLM, arXiv 2312.04916, section 3.1).

  A rising weight warms an exit up, a falling one cools it down.

  Attributes:
    start: weight at step 0 and, with CONSTANT, always.
    end: weight from step `steps` on.
    steps: length of the way from `start` to `end`, in optimizer steps.
    curve: its shape.

  Raises:
    UserError: a negative weight, or a curve without steps.
  """

  start: float
  end: float = 0.0
  steps: int = 0
  curve: WeightCurve = WeightCurve.CONSTANT

  def __post_init__(self) -> None:
    curve = choose(WeightCurve, self.curve, name='ExitWeight.curve')
    object.__setattr__(self, 'curve', curve)
    if self.start < 0 or self.end < 0:
      raise UserError(f'exit weight {min(self.start, self.end)} is negative: choose 0 or more')
    if self.curve is not WeightCurve.CONSTANT and self.steps < 1:
      raise UserError(f'a {self.curve.value} exit weight needs steps >= 1, got {self.steps}')

  def at(self, step: jax.Array | int) -> jax.Array:
    """The weight at `step` (i32 scalar): f32 scalar."""
    if self.curve is WeightCurve.CONSTANT:
      return jnp.asarray(self.start, jnp.float32)
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0.0, 1.0)
    if self.curve is WeightCurve.COSINE:
      progress = 0.5 * (1 - jnp.cos(jnp.pi * progress))
    return self.start + (self.end - self.start) * progress


class CurriculumKind(enum.Enum):
  """Which exits' losses count at which step (LayerSkip, arXiv 2404.16710, section 4.1.2)."""

  NONE = 'none'  # All, always.
  ROTATIONAL = 'rotational'  # Every R-th exit, another one at each step.
  GRADUAL = 'gradual'  # The deepest first, then one more each time, all from half of the run on.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitCurriculum:
  """LayerSkip's curricula, over the exits that a model has in place of all of its layers.

  Worked miniature, exits 0, 1, 2: ROTATIONAL with period 2 counts 0 and 2 at even steps, 1 at odd ones;
  GRADUAL over 12 steps counts 2 from step 0, 1 from step 2, 0 from step 4 on.

  Attributes:
    kind: which.
    period: ROTATIONAL: R, every exit counts once in so many steps.
    steps: GRADUAL: of the run; exit i of E begins to count at step `(E - 1 - i) * steps / (2 E)`.

  Raises:
    UserError: a curriculum without its number.
  """

  kind: CurriculumKind = CurriculumKind.NONE
  period: int = 2
  steps: int = 0

  def __post_init__(self) -> None:
    object.__setattr__(self, 'kind', choose(CurriculumKind, self.kind, name='ExitCurriculum.kind'))
    if self.kind is CurriculumKind.ROTATIONAL and self.period < 1:
      raise UserError(f'ExitCurriculum.period={self.period} must be at least 1')
    if self.kind is CurriculumKind.GRADUAL and self.steps < 1:
      raise UserError(f'a gradual ExitCurriculum needs steps >= 1, got {self.steps}')

  def at(self, step: jax.Array | int, *, num_exits: int) -> jax.Array:
    """1 for what counts at `step` (i32 scalar), else 0; the final layer always: f32 `[exits + 1]`."""
    exits = jnp.arange(num_exits)
    match self.kind:
      case CurriculumKind.NONE:
        counts = jnp.ones((num_exits,), bool)
      case CurriculumKind.ROTATIONAL:
        counts = (exits + step) % self.period == 0
      case CurriculumKind.GRADUAL:
        counts = 2 * num_exits * step >= (num_exits - 1 - exits) * self.steps
    return jnp.concatenate([counts, jnp.ones((1,), bool)]).astype(jnp.float32)
