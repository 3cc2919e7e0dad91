from __future__ import annotations

import numpy as np
import pytest

from exitax.evaluate.calibration.losses import (
  bits_per_byte_losses,
  forced_disagreement,
  lcs_length,
  mismatch,
  rouge_l_loss,
  token_disagreement,
)


@pytest.mark.parametrize(
  ('ours', 'full', 'expected'),
  [
    ([1, 2, 3, 4], [1, 2, 3, 4], 0.0),
    ([1, 2, 9, 4], [1, 2, 3, 4], 0.25),
    ([1, 2], [1, 2, 3, 4], 0.5),  # What is missing differs.
    ([1, 2, 3, 4], [1, 2], 0.5),
    ([], [1], 1.0),
    ([], [], 0.0),
  ],
)
def test_token_disagreement(ours, full, expected):
  assert token_disagreement(ours, full) == expected


def test_mismatch():
  assert mismatch([1, 2], [1, 2]) == 0
  assert mismatch([1, 2], [1, 2, 3]) == 1
  assert mismatch([1, 3], [1, 2]) == 1


def _lcs_table(first, second) -> int:
  table = np.zeros((len(first) + 1, len(second) + 1), int)
  for i, a in enumerate(first, start=1):
    for j, b in enumerate(second, start=1):
      table[i, j] = table[i - 1, j - 1] + 1 if a == b else max(table[i - 1, j], table[i, j - 1])
  return int(table[-1, -1])


def test_longest_common_subsequence_against_the_table():
  rng = np.random.default_rng(0)
  for _ in range(200):
    first = rng.integers(0, 4, rng.integers(0, 90)).tolist()
    second = rng.integers(0, 4, rng.integers(0, 90)).tolist()
    assert lcs_length(first, second) == _lcs_table(first, second)


@pytest.mark.parametrize(
  ('ours', 'full', 'expected'),
  [
    ('the cat sat', 'the cat sat', 0.0),
    ('The CAT, sat!', 'the cat sat', 0.0),  # Case and punctuation do not count.
    ('the cat', 'the cat sat on', 1 - 2 * 2 / 6),
    ('sat cat the', 'the cat sat', 1 - 2 * 1 / 6),
    ('привет мир', 'привет дом', 0.5),
    ('', '', 0.0),
    ('...', '...', 0.0),
    ('...', '???', 1.0),
    ('word', '', 1.0),
  ],
)
def test_rouge(ours, full, expected):
  assert rouge_l_loss(ours, full) == pytest.approx(expected)


def test_relative_increase_of_bits_per_byte():
  nll = np.array([[3.0, 4.0, 1.0], [2.0, 2.0, 2.0]])
  confidence = np.array([[0.8, 0.6, 0.4], [1.0, 1.0, 1.0]])
  # 1.0: nobody leaves. 0.7: the first token, 6 -> 7. 0.5: 6 -> 9. 0: 6 -> 8.
  losses = bits_per_byte_losses(nll, confidence, (1.0, 0.7, 0.5, 0.0))
  np.testing.assert_allclose(losses, [0, 1 / 6, 3 / 6, 2 / 6])


def test_bits_per_byte_is_clipped():
  nll = np.array([[1.0], [2.0]])
  assert bits_per_byte_losses(nll, np.ones((2, 1)), (0.5,)) == 0.0  # Better than full depth.
  nll = np.array([[9.0], [2.0]])
  assert bits_per_byte_losses(nll, np.ones((2, 1)), (0.5,)) == 1.0


def test_forced_disagreement():
  agrees = np.array([[True, False, False, True], [True, True, False, True], [True] * 4])
  confidence = np.array([[0.9, 0.9, 0.2, 0.2], [0.5, 0.5, 0.6, 0.6], [1.0] * 4])
  losses = forced_disagreement(agrees, confidence, (1.0, 0.7, 0.3, 0.0))
  np.testing.assert_allclose(losses, [0, 0.25, 0.5, 0.5])
