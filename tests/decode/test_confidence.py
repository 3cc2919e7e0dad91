import numpy as np
import pytest

from exitax.decode import OF_SCORES, Confidence


def test_values_of_a_worked_example():
  logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]))
  np.testing.assert_allclose(Confidence.MAX_PROB(logits), [0.5, 0.25], rtol=1e-6)
  np.testing.assert_allclose(Confidence.MARGIN(logits), [0.25, 0.0], atol=1e-6)
  # H = 1.75 bits of 2.
  np.testing.assert_allclose(Confidence.ENTROPY(logits), [1 - 1.75 / 2, 0.0], atol=1e-6)


@pytest.mark.parametrize('kind', OF_SCORES)
def test_extremes_stay_within_zero_and_one(kind):
  logits = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [88.0, 0.0, 0.0]], np.float32)
  value = np.asarray(kind(logits))
  assert (value >= 0).all()
  assert (value <= 1).all()
  assert value[0] == 1.0
