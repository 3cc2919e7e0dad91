"""Weighted cross-entropy of several exits on one vocabulary matrix, a slice of logits at a time.

Logits are the largest arrays of a language model: `[exits, batch, length, vocab]`. Here only one
slice `[batch, chunk, vocab]` lives at a time, and the gradients are made together with the loss,
while the slice is at hand: three matrix products per exit (as with all logits kept) instead of the
four of rematerialisation. This is possible because the loss is a *sum*, whose gradient is known up
to one scalar before the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from exitax.layers import Precision, contract, platform


@struct.dataclass
class ExitSums:
  """Sums over the counted tokens of a batch, one entry per exit.

  Attributes:
    nll: f32 `[exits]`, negative log-likelihoods in nats.
    log_z_squared: f32 `[exits]`, squared log-partition functions.
    correct: f32 `[exits]`, tokens whose target has the highest score.
  """

  nll: jax.Array
  log_z_squared: jax.Array
  correct: jax.Array


@struct.dataclass
class Teacher:
  """The final layer, as exits learn from it: not differentiated.

  An exit's target is then `(1 - share) * onehot(target) + share * softmax(teacher's scores)`.

  Attributes:
    features: `[batch, length, embed]`, what the final head's matrix reads.
    matrix: `[vocab, embed]`, that matrix.
    shares: f32 `[exits]`; 0 for exits that learn from the text alone, the final head among them.
  """

  features: jax.Array
  matrix: jax.Array
  shares: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def exit_cross_entropy(
  features: jax.Array,
  matrix: jax.Array,
  targets: jax.Array,
  token_weights: jax.Array,
  exit_weights: jax.Array,
  z_loss: float,
  chunk_length: int,
  precision: Precision,
  vocab_axis: str | None = None,
  teacher: Teacher | None = None,
) -> tuple[jax.Array, ExitSums]:
  """Weighted sum of the exits' losses: sum_e w_e sum_t u_t (nll + z_loss * log_z^2).

  With a teacher `nll` in the loss is the cross-entropy with its mixture of distributions; the sums are about
  the targets still. Each exit then costs a fourth product, the teacher's scores.

  Differentiable in `features` and `matrix`; the sums in the second result are not.

  Args:
    features: `[exits, batch, length, embed]`.
    matrix: `[vocab, embed]`.
    targets: i32 `[batch, length]`, or one such array per exit.
    token_weights: f32 like `targets`; 0 leaves a token out.
    exit_weights: f32 `[exits]`.
    z_loss: weight of the squared log-partition function (PaLM, arXiv 2204.02311, section 5).
    chunk_length: positions whose logits live at once; lowered to a divisor of the length.
    precision: formats of the matrix products.
    vocab_axis: a manual mesh axis (`jax.shard_map`) along which each device holds a part of the
      vocabulary, in order. Loss and sums are then those of the whole vocabulary, equal on every
      device; the gradients are each device's part, and add up over the axis.
    teacher: what exits learn from beside the targets; not with `vocab_axis`.

  Returns:
    The loss, a scalar in at least float32, and the sums of each exit.
  """
  loss, sums, _ = _scan_chunks(
    features,
    matrix,
    targets,
    token_weights,
    exit_weights,
    z_loss,
    chunk_length,
    precision,
    vocab_axis,
    teacher,
    None,
  )
  return loss, sums


def _forward(
  features: jax.Array,
  matrix: jax.Array,
  targets: jax.Array,
  token_weights: jax.Array,
  exit_weights: jax.Array,
  z_loss: float,
  chunk_length: int,
  precision: Precision,
  vocab_axis: str | None,
  teacher: Teacher | None,
) -> Any:
  zeros = jnp.zeros(matrix.shape, _wide(precision))
  loss, sums, gradients = _scan_chunks(
    features,
    matrix,
    targets,
    token_weights,
    exit_weights,
    z_loss,
    chunk_length,
    precision,
    vocab_axis,
    teacher,
    zeros,
  )
  d_features, d_matrix = gradients
  return (loss, sums), (d_features, d_matrix.astype(matrix.dtype))


def _backward(
  z_loss: float,
  chunk_length: int,
  precision: Precision,
  vocab_axis: str | None,
  gradients: Any,
  cotangent: Any,
) -> Any:
  del z_loss, chunk_length, precision, vocab_axis
  scale = cotangent[0]
  d_features, d_matrix = (g * scale.astype(g.dtype) for g in gradients)
  return d_features, d_matrix, None, None, None, None


exit_cross_entropy.defvjp(_forward, _backward)


def _scan_chunks(
  features: jax.Array,
  matrix: jax.Array,
  targets: jax.Array,
  token_weights: jax.Array,
  exit_weights: jax.Array,
  z_loss: float,
  chunk_length: int,
  precision: Precision,
  vocab_axis: str | None,
  teacher: Teacher | None,
  d_matrix: jax.Array | None,
) -> tuple[jax.Array, ExitSums, Any]:
  """Loss and sums; with an accumulator `d_matrix`, the gradients as well."""
  num_exits, batch, length, embed = features.shape
  chunk = _largest_divisor(length, chunk_length)
  num_chunks = length // chunk
  wide = _wide(precision)
  operand = matrix.astype(precision.dtype)
  whole = _Vocabulary(vocab_axis, matrix.shape[0])
  taught = _taught(teacher, (num_chunks, chunk), precision)

  def split(
    x: jax.Array,
  ) -> jax.Array:  # [(exits,) batch, length] -> [exits * chunks, batch, chunk]
    every = jnp.broadcast_to(x, (num_exits, batch, length))
    every = every.reshape(num_exits, batch, num_chunks, chunk).swapaxes(1, 2)
    return every.reshape(num_exits * num_chunks, batch, chunk)

  def step(carry: Any, inputs: Any) -> Any:
    loss, d_matrix = carry
    x, target, token_weight, exit_weight, number = inputs
    if platform.merges_axes(precision.dtype):
      x, target, token_weight = x.reshape(-1, embed), target.reshape(-1), token_weight.reshape(-1)
    x, last = x.astype(precision.dtype), x.ndim - 1
    logits = contract(x, operand, ((last,), (1,)))
    top = whole.max(jnp.max(logits, axis=-1))
    exponentials = jnp.exp(logits - top[..., None])
    partition = whole.sum(jnp.sum(exponentials, axis=-1))
    log_z = top + jnp.log(partition)
    entry = whole.first_entry + jax.lax.broadcasted_iota(jnp.int32, logits.shape, last)
    is_target = entry == target[..., None]
    # A gather on an axis that is split is not partitioned.
    if platform.partitioned() or vocab_axis is not None:
      target_logit = whole.sum(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
    else:
      target_logit = jnp.take_along_axis(logits, target[..., None], axis=-1, mode='clip')[..., 0]
    nll = log_z - target_logit
    z = jnp.square(log_z)
    sums = ExitSums(
      nll=jnp.sum(token_weight * nll),
      log_z_squared=jnp.sum(token_weight * z),
      correct=jnp.sum(token_weight * (target_logit >= top)),
    )
    loss += exit_weight * (sums.nll + z_loss * sums.log_z_squared)
    share, probabilities = taught(number, logits.shape)
    if probabilities is not None:
      # Cross-entropy with the teacher in place of a share of that with the target.
      expected = target_logit - jnp.sum(probabilities * logits, axis=-1)
      loss += exit_weight * share * jnp.sum(token_weight * expected)
    d_x = None
    if d_matrix is not None:
      scale = (exit_weight * token_weight).astype(wide)
      of_softmax = scale * (1 + 2 * z_loss * log_z) / partition
      of_target = jnp.where(is_target, (1 - share) * scale[..., None], 0.0)
      if probabilities is not None:
        of_target += share * scale[..., None] * probabilities
      d_logits = of_softmax[..., None] * exponentials - of_target
      d_logits = d_logits.astype(precision.dtype)
      d_x = contract(d_logits, operand, ((last,), (0,))).astype(features.dtype)
      d_matrix += contract(d_logits, x, (tuple(range(last)), tuple(range(last))))
    return (loss, d_matrix), (sums, d_x)

  # One scan over (exit, chunk) pairs, exits outermost.
  chunks = features.reshape(num_exits, batch, num_chunks, chunk, embed).swapaxes(1, 2)
  inputs = (
    chunks.reshape(num_exits * num_chunks, batch, chunk, embed),
    split(targets),
    split(token_weights),
    jnp.repeat(exit_weights, num_chunks),
    jnp.arange(num_exits * num_chunks),
  )
  (loss, d_matrix), (sums, d_x) = jax.lax.scan(step, (jnp.zeros((), wide), d_matrix), inputs)
  sums = jax.tree.map(lambda x: x.reshape(num_exits, num_chunks).sum(axis=1), sums)
  if d_x is not None:
    d_x = d_x.reshape(chunks.shape).swapaxes(1, 2).reshape(features.shape)
  return loss, sums, (d_x, d_matrix)


def _taught(teacher: Teacher | None, chunks: tuple[int, int], precision: Precision) -> Any:
  """A function of the number of an (exit, chunk) pair to the teacher's share and probabilities there.

  `chunks` are their number and their length. Nothing is computed for exits without a share.
  """
  if teacher is None:
    return lambda number, shape: (0.0, None)
  num_chunks, chunk = chunks
  batch, _, embed = teacher.features.shape
  features = jnp.asarray(teacher.features).reshape(batch, num_chunks, chunk, embed).swapaxes(0, 1)
  operand, shares = teacher.matrix.astype(precision.dtype), jnp.asarray(teacher.shares)
  wide = _wide(precision)

  def at(number: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    share = shares[number // num_chunks].astype(wide)

    def probabilities() -> jax.Array:
      x = jax.lax.dynamic_index_in_dim(features, number % num_chunks, 0, keepdims=False)
      x = x.astype(precision.dtype)
      return jax.nn.softmax(contract(x, operand, ((2,), (1,))), axis=-1).reshape(shape)

    return share, jax.lax.cond(share > 0, probabilities, lambda: jnp.zeros(shape, wide))

  return at


class _Vocabulary:
  """Reductions over a vocabulary of which this device holds `size` entries."""

  def __init__(self, axis: str | None, size: int) -> None:
    self._axis = axis
    self.first_entry = 0 if axis is None else jax.lax.axis_index(axis) * size

  def max(self, x: jax.Array) -> jax.Array:
    return x if self._axis is None else jax.lax.pmax(x, self._axis)

  def sum(self, x: jax.Array) -> jax.Array:
    return x if self._axis is None else jax.lax.psum(x, self._axis)


def _wide(precision: Precision) -> Any:
  return jnp.promote_types(precision.dtype, jnp.float32)


def _largest_divisor(number: int, limit: int) -> int:
  return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
