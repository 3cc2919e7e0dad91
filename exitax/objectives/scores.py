"""Held-out scores of every exit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from exitax.models import ExitLM, Params
from exitax.objectives.exit_objective import LossSums, ObjectiveConfig, PackedBatch, exit_objective

ScoreFn = Callable[[Params, PackedBatch], LossSums]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitScore:
  """How well one exit predicts held-out text.

  Attributes:
    name: `exit_<layer>` or `final`.
    layer: layers run before it.
    nll: nats per token.
    bits_per_byte: the same per byte of text; independent of the tokenizer.
    accuracy: share of tokens whose target has the highest score.
  """

  name: str
  layer: int
  nll: float
  bits_per_byte: float
  accuracy: float

  @property
  def perplexity(self) -> float:
    """exp(nll)."""
    return math.exp(min(self.nll, 700.0))


def make_score_fn(model: ExitLM, *, chunk_length: int = 128) -> ScoreFn:
  """A function of parameters and batch to the batch's `LossSums`, to be jitted.

  Args:
    model: the model.
    chunk_length: positions of each sequence whose logits live at once.
  """
  config = ObjectiveConfig(chunk_length=chunk_length)
  weights = jnp.ones(len(model.config.depths))

  def score(params: Params, batch: PackedBatch) -> LossSums:
    return exit_objective(model, params, batch, weights, config=config)[1]

  return score


def add_sums(parts: Iterable[LossSums]) -> LossSums:
  """The sums of several batches as float64 NumPy arrays.

  Raises:
    ValueError: there are none.
  """
  total = None
  for part in parts:
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
    total = wide if total is None else jax.tree.map(np.add, total, wide)
  if total is None:
    raise ValueError('no batches to score')
  return total


def exit_scores(model: ExitLM, sums: LossSums, *, bytes_per_token: float) -> tuple[ExitScore, ...]:
  """Scores of every exit, shallow to deep.

  Args:
    model: the model whose exits were summed.
    sums: totals over a held-out text.
    bytes_per_token: UTF-8 bytes per counted target of that text.
  """
  tokens = max(float(sums.tokens), 1.0)
  return tuple(
    ExitScore(
      name=name,
      layer=layer,
      nll=float(sums.exits.nll[i]) / tokens,
      bits_per_byte=float(sums.exits.nll[i]) / tokens / math.log(2) / bytes_per_token,
      accuracy=float(sums.exits.correct[i]) / tokens,
    )
    for i, (name, layer) in enumerate(
      zip(model.config.depth_names, model.config.depths, strict=True)
    )
  )
