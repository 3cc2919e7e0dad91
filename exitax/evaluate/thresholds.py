"""What a confidence threshold buys and costs, worked out from a table of tokens. Pure NumPy.

A token leaves at the first exit whose confidence is *above* the threshold, else at the final layer.
So with confidences in (0, 1] a threshold of 1 is the full model, and 0 is its first exit.

Every token sees the keys and values of the full model (teacher forcing), as it does in decoding
with a policy that fills skipped layers later: depth changes which exit's scores count, no more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from exitax.errors import UserError
from exitax.evaluate.token_table import TokenTable

DEFAULT_THRESHOLDS = tuple(round(1 - 0.05 * i, 2) for i in range(21))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthScore:
  """Quality and depth when each token leaves at an exit of its own.

  Attributes:
    nll: nats per token.
    bits_per_byte: the same per byte of text.
    accuracy: share of tokens whose target has the highest score.
    agreement: share of tokens whose highest score is also the final layer's.
    effective_layers: mean number of layers before the exit taken.
    exit_shares: share of tokens that leave at each exit, the final layer last; they sum to 1.
  """

  nll: float
  bits_per_byte: float
  accuracy: float
  agreement: float
  effective_layers: float
  exit_shares: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdRow(DepthScore):
  """The score of one threshold on one measure of confidence."""

  confidence: str
  threshold: float


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
  """The thresholds as floats, highest first, each once.

  Raises:
    UserError: there is none, or one is outside [0, 1].
  """
  for threshold in thresholds:
    if not 0 <= threshold <= 1:
      raise UserError(
        f'threshold={threshold} is outside [0, 1]: choose 1 for the full model, lower to exit '
        'earlier, 0 for the first exit'
      )
  if not thresholds:
    raise UserError('no thresholds: give at least one in [0, 1], such as 0.9')
  return tuple(sorted({float(threshold) for threshold in thresholds}, reverse=True))


def threshold_rows(
  table: TokenTable,
  *,
  confidence: str,
  thresholds: Sequence[float],
  depths: Sequence[int],
  bytes_per_token: float,
) -> tuple[ThresholdRow, ...]:
  """One row per threshold, in their order.

  Args:
    table: the tokens.
    confidence: which of the table's measures decides.
    thresholds: in [0, 1].
    depths: layers before each exit, the final layer last.
    bytes_per_token: UTF-8 bytes per counted target.

  Raises:
    UserError: a threshold outside [0, 1].
  """
  check_thresholds(thresholds)
  measured = table.confidence[confidence]
  rows = []
  for threshold in thresholds:
    exits = first_exit(measured[:-1] > threshold)
    score = depth_score(table, exits, depths=depths, bytes_per_token=bytes_per_token)
    fields = dataclasses.asdict(score)
    rows.append(ThresholdRow(**fields, confidence=confidence, threshold=float(threshold)))
  return tuple(rows)


def oracle_score(table: TokenTable, *, depths: Sequence[int], bytes_per_token: float) -> DepthScore:
  """Each token at the earliest exit that agrees with the final layer: the least depth without loss.

  No measure of confidence can go below its effective layers and keep an agreement of 1.
  """
  exits = first_exit(table.agrees[:-1])
  return depth_score(table, exits, depths=depths, bytes_per_token=bytes_per_token)


def first_exit(wanted: np.ndarray) -> np.ndarray:
  """Index of each token's first True of bool `[exits, tokens]`; the number of exits if none is."""
  always = np.ones((1, wanted.shape[1]), bool)
  return np.argmax(np.concatenate([wanted, always]), axis=0)


def depth_score(
  table: TokenTable, exits: np.ndarray, *, depths: Sequence[int], bytes_per_token: float
) -> DepthScore:
  """The score of tokens that leave at the given `exits`, indices `[tokens]`."""
  tokens = np.arange(table.num_tokens)
  nll = float(np.mean(table.nll[exits, tokens], dtype=np.float64))
  shares = np.bincount(exits, minlength=len(depths)) / table.num_tokens
  return DepthScore(
    nll=nll,
    bits_per_byte=nll / math.log(2) / bytes_per_token,
    accuracy=float(np.mean(table.correct[exits, tokens])),
    agreement=float(np.mean(table.agrees[exits, tokens])),
    effective_layers=float(np.mean(np.asarray(depths, np.float64)[exits])),
    exit_shares=tuple(float(share) for share in shares),
  )
