"""Who sees whom among texts that share a row, such as those of a group of thinkers: for caches and for training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Owner of the tokens of a prompt, which all texts of a row share.
PROMPT = -1


@struct.dataclass
class Origin:
  """Who fed a token and when, in a row that several texts share; i32 or bool `[rows, n]` each.

  Attributes:
    owner: the thinker, or `PROMPT`.
    step: of the row; -1 in the prompt.
    rank: order within a step.
    lag: of a query: it sees tokens of others that are at least so many steps old.
    by_rank: of a query: of the same step it sees those of lower rank; `lag` is not read then.
    sees_all: of a query: it sees everything, whatever the two say.
  """

  owner: jax.Array
  step: jax.Array
  rank: jax.Array
  lag: jax.Array
  by_rank: jax.Array
  sees_all: jax.Array


def sharing_mask(
  query: Any, key: Any, query_position: jax.Array, key_position: jax.Array
) -> jax.Array:
  """Who sees whom (Group Think, arXiv 2505.11107): bool `[rows, queries, keys]`.

  The prompt sees itself causally and all texts see it; a text sees itself up to now; thinker n at step t
  sees a token of another thinker of step s if s <= t - lag, or, by rank, if s < t or s = t and its rank is
  lower. A lag of 0 is the paper's conditioning on everyone's first t tokens; 1 sees only finished steps; one
  larger than any text sees no others: independent texts on a shared prompt. By rank it is the ordinary
  causal mask over tokens in turns.

  Args:
    query: an `Origin`, or anything with its fields, `[rows, queries]`.
    key: likewise, `[rows, keys]`.
    query_position: i32 `[rows, queries]`.
    key_position: i32 `[rows, keys]`.
  """
  owner, step, rank = (x[:, :, None] for x in (query.owner, query.step, query.rank))
  key_owner, key_step, key_rank = (x[:, None, :] for x in (key.owner, key.step, key.rank))
  ranked = (key_step < step) | ((key_step == step) & (key_rank < rank))
  others = jnp.where(query.by_rank[:, :, None], ranked, key_step <= step - query.lag[:, :, None])
  earlier = query_position[:, :, None] >= key_position[:, None, :]
  of_prompt = (key_owner == PROMPT) & ((owner != PROMPT) | earlier)
  own = (key_owner == owner) & (owner != PROMPT) & (key_step <= step)
  other = (key_owner != owner) & (key_owner != PROMPT) & (owner != PROMPT)
  return of_prompt | own | (other & (others | query.sees_all[:, :, None]))
