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
