"""Telling a run that has gone wrong from one that goes on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from exitax.errors import UserError
from exitax.models import Params
from exitax.objectives import LossSums
from exitax.training.step import StepMetrics


class DivergenceError(UserError):
  """The loss left the numbers that training can recover from."""


def largest_rms(params: Params) -> jax.Array:
  """The largest root mean square of any parameter, f32 scalar."""
  return jnp.max(jnp.stack([jnp.sqrt(jnp.mean(jnp.square(x))) for x in jax.tree.leaves(params)]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthBounds:
  """What separates healthy numbers from a divergence.

  Attributes:
    max_nll: largest loss of the final layer, in nats per token.
    max_rms: largest root mean square of one parameter. Far beyond it a norm's squares overflow, its
      output is zero, and the loss looks as harmless as that of guessing.
  """

  max_nll: float
  max_rms: float = 1e4

  def problem_in_step(self, metrics: StepMetrics) -> str | None:
    """What is wrong with a step's numbers, or None; they tell of the parameters *before* it."""
    nll = _nll(metrics.sums)
    loss, norm = float(metrics.loss), float(metrics.gradient_norm)
    if np.isfinite(loss) and np.isfinite(norm) and nll[-1] <= self.max_nll:
      return None
    return (
      f'loss {loss:.4g}, final layer {nll[-1]:.4g} (limit {self.max_nll:.4g}), '
      f'gradient norm {norm:.4g}'
    )

  def problem_in_parameters(self, sums: LossSums, rms: float) -> str | None:
    """What is wrong with parameters of this `largest_rms` that score like this, or None."""
    nll = _nll(sums)
    if np.all(np.isfinite(nll)) and nll[-1] <= self.max_nll and rms <= self.max_rms:
      return None
    losses = ', '.join(f'{value:.4g}' for value in nll)
    return (
      f'the new parameters give losses {losses} (limit {self.max_nll:.4g}) and are as large as '
      f'{rms:.4g} (limit {self.max_rms:.4g})'
    )


def _nll(sums: LossSums) -> np.ndarray:
  """Nats per token of every exit, `[exits + 1]`; host values."""
  return np.asarray(sums.exits.nll, np.float64) / max(float(sums.tokens), 1.0)
