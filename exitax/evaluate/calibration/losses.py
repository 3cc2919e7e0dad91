"""What early exit costs one sequence: a number in [0, 1] between its output and full depth's."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import numpy as np

from exitax.evaluate.thresholds import first_exit


class Metric(enum.Enum):
  """Which loss is bounded; 0 is no difference from full depth."""

  TOKEN_AGREEMENT = 'token_agreement'  # Share of tokens that differ.
  ROUGE = 'rouge'  # 1 - ROUGE-L F of the text, full depth's as reference.
  EXACT_MATCH = 'exact_match'  # 1 if the whole output differs anywhere, else 0.
  BITS_PER_BYTE = 'bits_per_byte'  # Relative increase of held-out bits per byte, clipped to [0, 1].

  @property
  def decodes(self) -> bool:
    """Whether text is generated; else given text is scored."""
    return self is not Metric.BITS_PER_BYTE


def token_disagreement(tokens: Sequence[int], full: Sequence[int]) -> float:
  """Share of places with another token; places that only the longer one has count as different."""
  longest = max(len(tokens), len(full))
  same = sum(a == b for a, b in zip(tokens, full, strict=False))
  return 1 - same / longest if longest else 0.0


def mismatch(tokens: Sequence[int], full: Sequence[int]) -> float:
  """1 if the outputs differ anywhere, else 0."""
  return float(list(tokens) != list(full))


def rouge_l_loss(text: str, full: str) -> float:
  """1 - ROUGE-L F1 (Lin, 2004): words of the longest common subsequence against both lengths.

  Words are runs of letters, digits and underscores of any script, in lower case. Without any word on
  one side, the loss is 0 if the texts are equal and else 1.
  """
  words, reference = _words(text), _words(full)
  if not words or not reference:
    return float(text != full)
  common = lcs_length(words, reference)
  return 1 - 2 * common / (len(words) + len(reference))


def lcs_length(first: Sequence[object], second: Sequence[object]) -> int:
  """Length of the longest common subsequence, a row of the table at a time as one integer's bits.

  Bit-parallel (Hyyro 2004): bit j of `row` is 0 where the row's value rises at column j.
  """
  places: dict[object, int] = {}
  for j, item in enumerate(second):
    places[item] = places.get(item, 0) | 1 << j
  every = (1 << len(second)) - 1
  row = every
  for item in first:
    matches = row & places.get(item, 0)
    row = (row + matches | row - matches) & every
  return len(second) - row.bit_count()


def bits_per_byte_losses(
  nll: np.ndarray, confidence: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
  """`[thresholds]`: relative increase of one text's bits per byte when tokens leave early.

  The bytes cancel: it is that of the summed negative log-likelihoods. It is clipped to [0, 1]: a text
  that early exits predict better than full depth counts as 0, not as a gain that could pay for
  others, and more than twice the bits count as 1.

  Args:
    nll: `[exits + 1, tokens]`, the final layer last.
    confidence: likewise.
    thresholds: a token takes the first exit with a confidence above.
  """
  tokens = np.arange(nll.shape[1])
  full = float(np.sum(nll[-1], dtype=np.float64))
  sums = [
    float(np.sum(nll[first_exit(confidence[:-1] > threshold), tokens], dtype=np.float64))
    for threshold in thresholds
  ]
  return np.clip([(total - full) / max(full, 1e-30) for total in sums], 0.0, 1.0)


def forced_disagreement(
  agrees: np.ndarray, confidence: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
  """`[thresholds]`: share of one text's tokens whose first confident exit ranks another token first.

  Args:
    agrees: bool `[exits + 1, tokens]`, whether each exit ranks first what the final layer does.
    confidence: `[exits + 1, tokens]`.
    thresholds: a token takes the first exit with a confidence above.
  """
  tokens = np.arange(agrees.shape[1])
  return np.asarray(
    [
      1 - np.mean(agrees[first_exit(confidence[:-1] > threshold), tokens])
      for threshold in thresholds
    ]
  )


def _words(text: str) -> list[str]:
  return re.findall(r'\w+', text.lower())
