"""From scores to a token: temperature, top-k, top-p, min-p, and a seed per request."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from exitax.decode.state import Requests
from exitax.errors import UserError

# What the arrays of `Requests` hold.
_HOTTEST = 3e38
_LARGEST_TOP_K = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """How one request chooses tokens.

  Filters act in Hugging Face's order: temperature, then top-k, then top-p, then min-p, each on
  what the one before has left.

  Attributes:
    temperature: divides the scores; 0 takes the most probable token.
    top_k: keeps the k best tokens; 0 keeps all.
    top_p: keeps the fewest best tokens whose probabilities reach p (nucleus sampling,
      arXiv 1904.09751); 1 keeps all.
    min_p: keeps tokens of at least this fraction of the best one's probability (arXiv 2407.01082);
      0 keeps all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self) -> None:
    if not 0.0 <= self.temperature <= _HOTTEST:
      raise UserError(f'temperature={self.temperature} is outside 0 (greedy) to {_HOTTEST:g}')
    if not 0 <= self.top_k <= _LARGEST_TOP_K:
      raise UserError(f'top_k={self.top_k} is outside 0 (all tokens) to {_LARGEST_TOP_K}')
    if not 0.0 < self.top_p <= 1.0:
      raise UserError(f'top_p={self.top_p} is outside (0, 1]: 1 keeps all tokens')
    if not 0.0 <= self.min_p <= 1.0:
      raise UserError(f'min_p={self.min_p} is outside [0, 1]: 0 keeps all tokens')


def choose_tokens(
  logits: jax.Array, requests: Requests, step: jax.Array, thinker: jax.Array | None = None
) -> jax.Array:
  """Next tokens, i32 `[rows]`.

  Args:
    logits: `[rows, vocab]`.
    requests: settings of each row.
    step: i32 `[rows]`, tokens that the request has generated so far.
    thinker: i32 `[rows]`, which of a group writes; None is 0.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  samples = requests.temperature > 0.0

  def sample() -> jax.Array:
    filtered = filter_logits(logits, requests)
    writer = jnp.zeros_like(step) if thinker is None else thinker
    keys = jax.vmap(token_key)(jnp.asarray(requests.seed), step, writer)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return jnp.where(samples, jnp.argmax(filtered + noise, axis=-1).astype(jnp.int32), greedy)

  return jax.lax.cond(jnp.any(samples), sample, lambda: greedy)


def filter_logits(logits: jax.Array, requests: Requests) -> jax.Array:
  """Scores after temperature and filters, `[rows, vocab]`; -inf where a token is ruled out.

  Tokens that tie with the last one kept are kept. The most probable token always stays.
  """
  temperature = jnp.where(requests.temperature > 0.0, requests.temperature, 1.0)
  scaled = logits.astype(jnp.float32) / temperature[:, None]
  filters = (requests.top_k > 0) | (requests.top_p < 1.0) | (requests.min_p > 0.0)

  def filtered() -> jax.Array:
    return jnp.where(scaled >= _cutoff(scaled, requests)[:, None], scaled, -jnp.inf)

  return jax.lax.cond(jnp.any(filters), filtered, lambda: scaled)


def token_key(seed: jax.Array, step: jax.Array, thinker: jax.Array | int = 0) -> jax.Array:
  """The key of one token: a function of the request and its step, never of array positions."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), thinker), step)


def _cutoff(scaled: jax.Array, requests: Requests) -> jax.Array:
  """Smallest score kept, `[rows]`: every filter keeps a prefix of the descending order."""
  vocab = scaled.shape[-1]
  ordered = -jnp.sort(-scaled, axis=-1)
  rank = jnp.arange(vocab)
  top_k = jnp.where(requests.top_k > 0, jnp.minimum(requests.top_k, vocab), vocab)
  kth = jnp.take_along_axis(ordered, top_k[:, None] - 1, axis=-1)
  kept = ordered >= kth
  probs = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
  # A token stays if the better ones do not reach p already.
  before = jnp.cumsum(probs, axis=-1) - probs
  kept &= (before < requests.top_p[:, None]) | (requests.top_p[:, None] >= 1.0)
  probs = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
  kept &= probs >= requests.min_p[:, None] * probs[:, :1]
  kept |= rank == 0
  last = jnp.sum(kept, axis=-1) - 1
  return jnp.take_along_axis(ordered, last[:, None], axis=-1)[:, 0]
