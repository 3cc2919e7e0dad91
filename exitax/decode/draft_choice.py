"""Where to draft and how far: DEL's rule (arXiv 2504.05598) with costs that know about lanes.

A round that drafts `d` tokens with the layers up to exit `j`, whose tokens the final layer would have
chosen with probability `a`, gains (1 - a^(d+1)) / (1 - a) tokens on average: the accepted run and
one token of the final layer's own. DEL divides by `d * l + L` layers; here by seconds or anything
proportional to them, since a pass over several lanes costs more than a pass over one, and heads cost.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from exitax.layers import HeadKind
from exitax.models import ExitConfig, ModelConfig

# How much more a pass costs with each further lane, as a fraction of the first: measured on two CPU
# cores (8 layers of width 512: 2.1 times for 16 lanes). Accelerators: about 0 up to dozens of lanes.
LANE_SLOPE = 0.07


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftCosts:
  """What rounds cost, in one unit of any size (`estimate_costs`, or measured seconds).

  Attributes:
    rounds: per exit, for 1, 2, ... drafts.
    plain: a step that drafts nothing: all layers and the final head on one lane.
  """

  rounds: tuple[tuple[float, ...], ...]
  plain: float

  def speedup(self, exit_index: int, num_drafts: int, tokens: float) -> float:
    """How much faster rounds that gain `tokens` on average are than plain steps."""
    return tokens * self.plain / self.rounds[exit_index][num_drafts - 1]


@struct.dataclass
class DraftStats:
  """What a row has seen of each exit.

  Attributes:
    agreed: f32 `[rows, exits]`, recent tokens on which the exit agreed with the final layer.
    tried: f32 `[rows, exits]`, recent tokens on which the two were compared.
    rounds: i32 `[rows]`, all rounds.
    drafted: i32 `[rows, exits]`, all drafts.
    accepted: i32 `[rows, exits]`, all drafts accepted.
  """

  agreed: jax.Array
  tried: jax.Array
  rounds: jax.Array
  drafted: jax.Array
  accepted: jax.Array


def no_stats(rows: int, num_exits: int) -> DraftStats:
  """Statistics before the first round."""
  floats = jnp.zeros((rows, num_exits), jnp.float32)
  counts = jnp.zeros((rows, num_exits), jnp.int32)
  return DraftStats(
    agreed=floats,
    tried=floats,
    rounds=jnp.zeros((rows,), jnp.int32),
    drafted=counts,
    accepted=counts,
  )


def remember(
  stats: DraftStats,
  exit_index: jax.Array | int,
  num_drafts: jax.Array | int,
  count: jax.Array,
  compared: tuple[jax.Array, jax.Array],
  *,
  memory: float,
) -> DraftStats:
  """Books a round: a refused draft was tried too, what would have followed it was not.

  Args:
    stats: before the round.
    exit_index: where it drafted; the number of exits for a plain step.
    num_drafts: how many drafts.
    count: i32 `[rows]`, tokens gained; 0 for rows that took no part.
    compared: f32 `[rows, exits]` twice: agreement seen of exits that did not draft, and tokens
      compared.
    memory: how much of what was known counts after one more token.
  """
  active = count > 0
  accepted = jnp.maximum(count - 1, 0)
  tried = jnp.where(active, jnp.minimum(accepted + 1, num_drafts), 0)
  drafter = (jnp.arange(stats.tried.shape[1]) == exit_index).astype(jnp.int32)
  # What was learnt of an exit fades as more is learnt of it, and stays while nothing is.
  new_agreed = drafter * accepted[:, None] + compared[0]
  new_tried = drafter * tried[:, None] + compared[1]
  keep = jnp.where(new_tried > 0, memory**new_tried, 1.0)
  return DraftStats(
    agreed=stats.agreed * keep + new_agreed,
    tried=stats.tried * keep + new_tried,
    rounds=stats.rounds + active.astype(jnp.int32),
    drafted=stats.drafted + drafter * jnp.where(active, num_drafts, 0)[:, None],
    accepted=stats.accepted + drafter * accepted[:, None],
  )


def tokens_per_round(agreement: jax.Array, num_drafts: jax.Array | int) -> jax.Array:
  """(1 - a^(d+1)) / (1 - a), and d + 1 where a is 1."""
  one = agreement >= 1.0 - 1e-6
  safe = jnp.where(one, 0.5, agreement)
  geometric = (1.0 - safe ** (num_drafts + 1)) / (1.0 - safe)
  return jnp.where(one, jnp.asarray(num_drafts + 1, geometric.dtype), geometric)


def choose_draft(
  stats: DraftStats,
  active: jax.Array,
  costs: DraftCosts,
  *,
  prior: float,
  prior_weight: float,
) -> tuple[jax.Array, jax.Array]:
  """The exit and the number of drafts that promise most tokens per cost to the active rows together.

  Args:
    stats: what rows have seen.
    active: bool `[rows]`.
    costs: of rounds.
    prior: agreement that an exit is thought to have before it was tried.
    prior_weight: how many tokens' worth of trust that deserves.

  Returns:
    I32 scalars: the exit's index, or the number of exits for a plain step; and the number of drafts,
    0 for a plain step.
  """
  cost = jnp.asarray(costs.rounds)
  num_exits, max_drafts = cost.shape
  agreement = (stats.agreed + prior * prior_weight) / (stats.tried + prior_weight)
  share = active / jnp.maximum(jnp.sum(active), 1)
  lengths = jnp.arange(1, max_drafts + 1)
  expected = tokens_per_round(agreement[:, :, None], lengths)  # [rows, exits, lengths]
  rate = jnp.einsum('r,rjd->jd', share, expected) / cost
  best = jnp.argmax(rate)
  pays = rate.ravel()[best] * costs.plain > 1.0
  exit_index = jnp.where(pays, best // max_drafts, num_exits)
  return exit_index.astype(jnp.int32), jnp.where(pays, best % max_drafts + 1, 0).astype(jnp.int32)


def estimate_costs(
  config: ModelConfig,
  exits: tuple[ExitConfig, ...],
  *,
  max_drafts: int,
  lane_slope: float = LANE_SLOPE,
) -> DraftCosts:
  """Costs in layers read, the bound of decoding; each lane after the first costs `lane_slope` more.

  A round of d drafts at exit l runs d + 1 passes of l layers, d heads, and one pass of the others and
  the final head over d + 1 lanes, padded.
  """
  block = config.block
  attention = block.embed_dim * block.head_dim * 2 * (block.num_heads + block.num_kv_heads)
  mlp = 3 * block.embed_dim * block.mlp_dim
  layer = attention + mlp
  matrix = config.vocab_size * config.embed_dim / layer
  own = {
    HeadKind.EMBEDDING: 0.0,
    HeadKind.NORM: 0.0,
    HeadKind.MLP: mlp / layer,
    HeadKind.LAYER: 1.0,
  }

  def of_round(item: ExitConfig, num_drafts: int) -> float:
    lanes = next(n for n in draft_buckets(max_drafts) if n > num_drafts)
    drafting = (num_drafts + 1) * item.layer + num_drafts * (own[item.head] + matrix)
    return drafting + (1.0 + lane_slope * (lanes - 1)) * (config.num_layers - item.layer + matrix)

  lengths = range(1, max_drafts + 1)
  return DraftCosts(
    rounds=tuple(tuple(of_round(item, d) for d in lengths) for item in exits),
    plain=config.num_layers + matrix,
  )


def draft_buckets(max_drafts: int) -> tuple[int, ...]:
  """Numbers of lanes for verification: 4, 8, ... up to the first that holds `max_drafts + 1`.

  Few, since each is compiled; and padded, since 8 lanes have cost less than 5.
  """
  top = max(2, math.ceil(math.log2(max_drafts + 1)))
  return tuple(2**i for i in range(2, top + 1))
