"""What every exit says of every held-out token, from one teacher-forced pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from exitax.data import Batch
from exitax.models import ExitLM, Params, features_at_exits
from exitax.objectives import PackedBatch
from exitax.parallel import ShardingRules, replicated, shard_batch, use

ConfidenceFn = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTable:
  """One column per counted token, one row per exit; the last row is the final layer.

  Attributes:
    nll: float32 `[exits + 1, tokens]`, negative log-likelihood of the target in nats.
    correct: bool `[exits + 1, tokens]`, whether the highest score is the target's.
    agrees: bool `[exits + 1, tokens]`, whether the highest score is also the final layer's.
    confidence: for each measure, float32 `[exits + 1, tokens]` in [0, 1].
  """

  nll: np.ndarray
  correct: np.ndarray
  agrees: np.ndarray
  confidence: Mapping[str, np.ndarray]

  @property
  def num_tokens(self) -> int:
    """Counted tokens: those whose target has a weight above 0."""
    return self.nll.shape[1]


def token_table(
  model: ExitLM,
  params: Params,
  batches: Iterable[Batch],
  *,
  measures: Mapping[str, ConfidenceFn],
  chunk_length: int,
  mesh: Mesh,
  rules: ShardingRules,
) -> TokenTable:
  """Runs the model over all batches; columns keep the order of the tokens in them.

  Args:
    model: the model.
    params: parameters with stacked blocks, on the mesh.
    batches: held-out batches, this process's rows of each; all of one shape.
    measures: name -> function of logits `[..., vocab]` to confidence `[...]`.
    chunk_length: positions of each row whose logits live at once.
    mesh: where the work is done.
    rules: how batches are spread over it.

  Raises:
    ValueError: there are no batches.
    UserError: the batch does not spread over the mesh.
  """
  score_fn = _make_score_fn(model, measures=measures, chunk_length=chunk_length)
  # Whole on every device, so that each process can fetch the columns of all.
  score = jax.jit(score_fn, out_shardings=replicated(mesh))
  parts = []
  with use(mesh, rules):
    for batch in batches:
      parts.append(_counted(jax.device_get(score(params, shard_batch(batch, mesh, rules)))))
  if not parts:
    raise ValueError('no batches to score')
  whole = jax.tree.map(lambda *columns: np.concatenate(columns, axis=-1), *parts)
  best = whole['best']
  return TokenTable(
    nll=whole['nll'],
    correct=best == whole['target'],
    agrees=best == best[-1],
    confidence=whole['confidence'],
  )


def _make_score_fn(
  model: ExitLM, *, measures: Mapping[str, ConfidenceFn], chunk_length: int
) -> Callable[[Params, PackedBatch], Any]:
  """A function of a batch to arrays `[exits + 1, batch, length]`, no more logits than a slice."""

  def score(params: Params, batch: PackedBatch) -> Any:
    features = features_at_exits(model, params, batch.tokens, batch.segment_ids, batch.positions)
    heads = (*model.config.exits, None)
    exits = []
    for head, x in zip(heads, features, strict=True):

      def score_slice(inputs: Any, head: Any = head) -> Any:
        x, targets = inputs
        logits = model.logits(params, head, x)
        # A sum in place of a gather: the vocabulary may be spread over devices.
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        return {
          'nll': jax.nn.logsumexp(logits, axis=-1) - target_logit,
          'best': jnp.argmax(logits, axis=-1).astype(jnp.int32),
          'confidence': {name: measure_fn(logits) for name, measure_fn in measures.items()},
        }

      slices = jax.lax.map(score_slice, _split((x, batch.targets), chunk_length))
      exits.append(jax.tree.map(_join, slices))
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *exits)
    return {**stacked, 'target': batch.targets, 'weights': batch.weights}

  return score


def _split(tree: Any, chunk_length: int) -> Any:
  """Leaves `[batch, length, ...]` as `[chunks, batch, chunk, ...]`."""

  def split(x: jax.Array) -> jax.Array:
    batch, length, *rest = x.shape
    chunk = next(d for d in range(min(length, chunk_length), 0, -1) if length % d == 0)
    return x.reshape(batch, length // chunk, chunk, *rest).swapaxes(0, 1)

  return jax.tree.map(split, tree)


def _join(x: jax.Array) -> jax.Array:
  """Inverse of `_split` for one leaf `[chunks, batch, chunk]`."""
  chunks, batch, chunk = x.shape
  return x.swapaxes(0, 1).reshape(batch, chunks * chunk)


def _counted(scores: Any) -> Any:
  """Leaves `[..., batch, length]` as `[..., tokens]`: only those with a weight."""
  counted = scores.pop('weights') > 0
  return jax.tree.map(lambda x: np.asarray(x)[..., counted], scores)
