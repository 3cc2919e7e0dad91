"""How sure an exit is of its scores, in [0, 1]."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitView:
  """What a measure of confidence may look at, for the newest token of each row.

  Attributes:
    scores: `[rows, vocab]` of the exit; None for measures that do not read them.
    before: `[rows, embed]`, the stream at the exit before, or the embedding.
    stream: `[rows, embed]`, the stream at this exit.
    agreeing: i32 `[rows]`, exits in a row, this one included, that rank the same token first.
    patience: how many must.
    classifier: this exit's `kernel` `[embed]` and `bias` `[]`, for CLASSIFIER.
  """

  scores: jax.Array | None
  before: jax.Array
  stream: jax.Array
  agreeing: jax.Array
  patience: int
  classifier: Any


class Confidence(enum.Enum):
  """A measure of confidence.

  The first four read the exit's scores (at temperature 1, before any filter), which cost a product
  with the vocabulary matrix at every exit that a token reaches. The last two read the residual
  stream alone: the matrix is read at the exit that is taken, and nowhere else.
  """

  MAX_PROB = 'max_prob'  # The largest probability (CALM, arXiv 2207.07061).
  MARGIN = 'margin'  # The largest minus the second largest probability (the same).
  ENTROPY = 'entropy'  # 1 - H(p) / ln V.
  PATIENCE = 'patience'  # 1 once enough exits in a row agree on the best token (arXiv 2006.04152).
  COSINE = 'cosine'  # Cosine of the stream with that at the exit before (CALM's saturation).
  CLASSIFIER = 'classifier'  # A learned linear classifier on the stream (CALM).

  @property
  def reads_scores(self) -> bool:
    """Whether the exit's scores are needed."""
    return self not in (Confidence.COSINE, Confidence.CLASSIFIER)

  @property
  def reads_exit_before(self) -> bool:
    """Whether the stream at the exit before is needed."""
    return self is Confidence.COSINE

  @property
  def reads_one_exit(self) -> bool:
    """Whether one exit's scores are all it needs, as in `__call__`."""
    return self in OF_SCORES

  def __call__(self, logits: jax.Array) -> jax.Array:
    """f32 `[...]` between 0 and 1, of `logits` `[..., vocab]`; for the measures in `OF_SCORES`."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    match self:
      case Confidence.MAX_PROB:
        value = jnp.exp(jnp.max(log_probs, axis=-1))
      case Confidence.MARGIN:
        top, _ = jax.lax.top_k(log_probs, 2)
        value = jnp.exp(top[..., 0]) - jnp.exp(top[..., 1])
      case Confidence.ENTROPY:
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        value = 1.0 - entropy / math.log(logits.shape[-1])
      case _:
        raise ValueError(f"{self.value} is not a function of one exit's scores")
    return jnp.clip(value, 0.0, 1.0)

  def of_exit(self, view: ExitView) -> jax.Array:
    """f32 `[rows]` between 0 and 1."""
    match self:
      case Confidence.PATIENCE:
        return (view.agreeing >= view.patience).astype(jnp.float32)
      case Confidence.COSINE:
        return cosine(view.before, view.stream)
      case Confidence.CLASSIFIER:
        return jax.nn.sigmoid(classifier_logit(view.classifier, view.stream))
      case _:
        assert view.scores is not None
        return self(view.scores)


# Functions of one exit's scores and nothing else.
OF_SCORES = (Confidence.MAX_PROB, Confidence.MARGIN, Confidence.ENTROPY)


def cosine(before: jax.Array, stream: jax.Array) -> jax.Array:
  """Cosine between two streams `[..., embed]`, f32 `[...]`, negative ones as 0."""
  before, stream = before.astype(jnp.float32), stream.astype(jnp.float32)
  product = jnp.sum(before * stream, axis=-1)
  lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(stream, axis=-1)
  return jnp.clip(product / jnp.maximum(lengths, 1e-30), 0.0, 1.0)


def classifier_logit(classifier: Any, stream: jax.Array) -> jax.Array:
  """f32 `[...]`: log-odds that the exit's best token is the final layer's.

  Args:
    classifier: `kernel` `[embed]` and `bias` `[]`.
    stream: `[..., embed]`; its scale is divided out first.
  """
  stream = stream.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(stream**2, axis=-1, keepdims=True) + 1e-6)
  return (stream * scale) @ classifier['kernel'] + classifier['bias']
