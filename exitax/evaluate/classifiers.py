"""Learned confidence: a linear classifier per exit that says whether its token will stand.

CALM (arXiv 2207.07061, section 3.5) trains a linear map of the stream at an exit, on the frozen model, to
predict whether the exit's best token is the final layer's. While decoding it costs a product with one
vector, where probabilities cost the vocabulary matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from exitax.data import Batch, Progress, quiet
from exitax.decode import Confidence, classifier_logit, cosine
from exitax.errors import UserError
from exitax.models import ExitLM, Params
from exitax.models.forward import packed_attend
from exitax.objectives import PackedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
  """How classifiers are trained.

  Attributes:
    batches: of the training part of the text, to learn from.
    held_out_batches: of the held-out part, to report on.
    max_tokens: tokens to learn from at most, spread over the batches.
    l2: weight of the squared kernel in the loss.
    iterations: of L-BFGS.

  Raises:
    UserError: a number out of range.
  """

  batches: int = 16
  held_out_batches: int = 8
  max_tokens: int = 20_000
  l2: float = 1e-4
  iterations: int = 100

  def __post_init__(self) -> None:
    for name in ('batches', 'held_out_batches', 'max_tokens', 'iterations'):
      if getattr(self, name) < 1:
        raise UserError(f'ClassifierConfig.{name}={getattr(self, name)} must be at least 1')
    if not self.l2 >= 0:
      raise UserError(f'ClassifierConfig.l2={self.l2} must be 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitStreams:
  """What exits see of some tokens, and whether their best token is the final layer's.

  Attributes:
    stream: float32 `[exits, tokens, embed]`.
    agrees: bool `[exits, tokens]`.
    max_prob: float32 `[exits, tokens]`, for comparison.
    cosine: float32 `[exits, tokens]`, with the stream at the exit before.
  """

  stream: np.ndarray
  agrees: np.ndarray
  max_prob: np.ndarray
  cosine: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierScore:
  """How well measures tell an exit's right tokens from its wrong ones, on held-out text.

  Attributes:
    layer: of the exit.
    agreement: share of tokens on which the exit agrees with the final layer.
    auroc: measure -> chance that it ranks a random right token above a random wrong one.
  """

  layer: int
  agreement: float
  auroc: dict[str, float]


def collect_streams(
  model: ExitLM,
  params: Params,
  batches: Iterable[Batch],
  *,
  total: int,
  max_tokens: int,
  progress: Progress = quiet,
) -> ExitStreams:
  """Runs the frozen model over packed batches, tokens with a weight alone.

  Args:
    model: the model, with exits.
    params: parameters with stacked blocks.
    batches: at least `total` of them.
    total: how many to take.
    max_tokens: kept at most, as many of each batch.
    progress: shown while it takes.
  """
  run = jax.jit(lambda batch: _observe(model, params, batch))
  share, parts = -(-max_tokens // total), []
  for batch, _ in progress(
    zip(batches, range(total), strict=False), total=total, label='reading streams'
  ):
    counted = np.flatnonzero(np.asarray(batch.weights).reshape(-1) > 0)
    kept = counted[:: max(1, -(-len(counted) // share))]
    found = jax.device_get(run(batch))
    parts.append({name: array[:, kept] for name, array in found.items()})
  joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
  return ExitStreams(**joined)


def fit_classifiers(
  streams: ExitStreams, layers: tuple[int, ...], config: ClassifierConfig = ClassifierConfig()
) -> dict[str, dict[str, np.ndarray]]:
  """Logistic regression per exit: layer (as text) -> `kernel` f32 `[embed]`, `bias` f32 `[]`."""
  return {
    str(layer): jax.device_get(
      _fit(streams.stream[i], streams.agrees[i], l2=config.l2, iterations=config.iterations)
    )
    for i, layer in enumerate(layers)
  }


def score_classifiers(
  classifiers: dict[str, Any], streams: ExitStreams
) -> tuple[ClassifierScore, ...]:
  """Learned and other measures beside each other."""
  scores = []
  for i, (layer, classifier) in enumerate(classifiers.items()):
    measures = {
      Confidence.CLASSIFIER.value: np.asarray(
        classifier_logit(classifier, jnp.asarray(streams.stream[i]))
      ),
      Confidence.MAX_PROB.value: streams.max_prob[i],
      Confidence.COSINE.value: streams.cosine[i],
    }
    scores.append(
      ClassifierScore(
        layer=int(layer),
        agreement=float(streams.agrees[i].mean()),
        auroc={name: auroc(values, streams.agrees[i]) for name, values in measures.items()},
      )
    )
  return tuple(scores)


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
  """Area under the ROC curve: the Mann-Whitney statistic, ties counted half; NaN without both kinds."""
  num_positive = int(positive.sum())
  num_negative = len(positive) - num_positive
  if not num_positive or not num_negative:
    return float('nan')
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  ends = np.cumsum(counts)
  ranks = (ends - (counts - 1) / 2)[place]
  surplus = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
  return float(surplus / num_positive / num_negative)


def _observe(model: ExitLM, params: Params, batch: PackedBatch) -> dict[str, jax.Array]:
  """Arrays `[exits, batch * length, ...]` of one batch."""
  attend = packed_attend(batch.segment_ids, batch.positions, model.config.sliding_window)
  rotary = model.rotary(batch.positions, below=batch.positions.shape[-1])
  hidden = model.embed(params, batch.tokens)
  kept = model.hidden_at_exits(params, hidden, rotary=rotary, attend=attend)
  before = jnp.concatenate([hidden[None], kept[:-1]])
  best, sure = [], []
  for i, head in enumerate((*model.config.exits, None)):
    features, _ = model.exit_features(params, head, kept[i], rotary=rotary, attend=attend)
    logits = model.logits(params, head, features)
    best.append(jnp.argmax(logits, axis=-1))
    sure.append(Confidence.MAX_PROB(logits))
  found = {
    'stream': kept[:-1].astype(jnp.float32),
    'agrees': jnp.stack(best[:-1]) == best[-1],
    'max_prob': jnp.stack(sure[:-1]),
    'cosine': cosine(before, kept)[:-1],
  }
  return {name: x.reshape(x.shape[0], -1, *x.shape[3:]) for name, x in found.items()}


def _fit(stream: np.ndarray, agrees: np.ndarray, *, l2: float, iterations: int) -> dict[str, Any]:
  """Minimises the mean logistic loss by L-BFGS, from zero."""
  start = {
    'kernel': jnp.zeros(stream.shape[1], jnp.float32),
    'bias': jnp.zeros((), jnp.float32),
  }

  def loss(classifier: Any) -> jax.Array:
    logit = classifier_logit(classifier, jnp.asarray(stream))
    nll = optax.losses.sigmoid_binary_cross_entropy(logit, agrees.astype(np.float32))
    return jnp.mean(nll) + l2 * jnp.sum(classifier['kernel'] ** 2)

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def advance(carry: Any, _: None) -> Any:
    classifier, state = carry
    value, grad = value_and_grad(classifier, state=state)
    updates, state = solver.update(grad, state, classifier, value=value, grad=grad, value_fn=loss)
    return (optax.apply_updates(classifier, updates), state), None

  def solve() -> Any:
    (classifier, _), _ = jax.lax.scan(advance, (start, solver.init(start)), None, length=iterations)
    return classifier

  return jax.jit(solve)()
