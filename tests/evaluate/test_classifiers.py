import jax
import numpy as np
import pytest

from exitax.data import Batch
from exitax.errors import UserError
from exitax.evaluate.classifiers import (
  ClassifierConfig,
  ExitStreams,
  auroc,
  collect_streams,
  fit_classifiers,
  score_classifiers,
)
from exitax.models import ExitConfig, ExitLM, ModelConfig, logits_at_exits


def _streams(num_tokens, seed, *, noise=0.5):
  """Agreement that is a noisy function of one direction of the stream."""
  rng = np.random.default_rng(seed)
  stream = rng.normal(size=(2, num_tokens, 8)).astype(np.float32)
  margin = stream @ np.array([2, -1, 0, 0, 0, 0, 0, 0]) + 0.5
  agrees = margin + noise * rng.normal(size=margin.shape) > 0
  nothing = np.zeros((2, num_tokens), np.float32)
  return ExitStreams(stream=stream, agrees=agrees, max_prob=nothing, cosine=nothing)


def test_auroc_of_worked_examples():
  values, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
  assert auroc(values, positive) == 0.75
  assert auroc(np.zeros(4), positive) == 0.5
  assert np.isnan(auroc(values, np.ones(4, bool)))


def test_a_direction_that_decides_is_learnt_and_others_are_not():
  classifiers = fit_classifiers(_streams(3000, 0), (1, 2))
  assert list(classifiers) == ['1', '2']
  kernel = classifiers['1']['kernel']
  assert kernel[0] > 2 * abs(kernel[1]) * 0.8
  assert kernel[1] < 0
  assert np.abs(kernel[2:]).max() < 0.2 * kernel[0]
  scores = score_classifiers(classifiers, _streams(2000, 1))
  assert [score.layer for score in scores] == [1, 2]
  assert all(score.auroc['classifier'] > 0.9 for score in scores)
  assert all(score.auroc['max_prob'] == 0.5 for score in scores)


def test_the_fit_is_a_minimum_of_the_logistic_loss():
  """Its gradient in float64 is that of a stationary point."""
  streams = _streams(500, 0, noise=2.0)
  config = ClassifierConfig(l2=1e-2, iterations=200)
  found = fit_classifiers(streams, (1, 2), config)['1']
  x = streams.stream[0].astype(np.float64)
  x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  error = 1 / (1 + np.exp(-(x @ found['kernel'] + found['bias']))) - streams.agrees[0]
  gradient = (x * error[:, None]).mean(0) + 2 * config.l2 * found['kernel']
  assert np.abs(gradient).max() < 1e-4
  assert abs(error.mean()) < 1e-4


def test_streams_are_those_of_counted_tokens():
  config = ModelConfig(
    vocab_size=20,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    mlp_dim=16,
    max_length=16,
    exits=(ExitConfig(layer=1), ExitConfig(layer=2)),
  )
  model = ExitLM(config)
  params = jax.tree.map(lambda x: x * 5, model.init(jax.random.key(0)))
  tokens = np.random.default_rng(0).integers(0, 20, (2, 8)).astype(np.int32)
  ids, positions = np.ones_like(tokens), np.tile(np.arange(8, dtype=np.int32), (2, 1))
  weights = np.ones(tokens.shape, np.float32)
  weights[1, 5:] = 0
  batch = Batch(tokens, tokens, ids, positions, weights)
  found = collect_streams(model, params, [batch, batch], total=2, max_tokens=1000)
  assert found.stream.shape == (2, 26, 16)
  best = np.asarray(logits_at_exits(model, params, tokens, ids, positions)).argmax(-1)
  expected = (best[:-1] == best[-1]).reshape(2, -1)[:, weights.reshape(-1) > 0]
  np.testing.assert_array_equal(found.agrees[:, :13], expected)
  np.testing.assert_array_equal(found.agrees[:, 13:], expected)
  assert 0 < expected.mean() < 1
  few = collect_streams(model, params, [batch, batch], total=2, max_tokens=10)
  assert few.stream.shape[1] <= 10


@pytest.mark.parametrize('name', ['batches', 'max_tokens', 'iterations'])
def test_numbers_out_of_range_are_named(name):
  with pytest.raises(UserError, match=f'{name}=0 must be at least 1'):
    ClassifierConfig(**{name: 0})
