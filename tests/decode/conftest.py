"""Tiny models that exit with variety, and the cache-free oracle of a thresholded decode."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.layers import HeadKind
from exitax.models import ExitConfig, ExitLM, ModelConfig, logits_at_exits

TOLERANCE = 1e-3


@functools.cache
def make_tiny(head: HeadKind = HeadKind.NORM, **changes):
  """A model with exits after layers 1 and 2 of 4 and its (sharpened) random parameters."""
  config = ModelConfig(
    vocab_size=48,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    max_length=128,
    exits=(ExitConfig(layer=1, head=head), ExitConfig(layer=2, head=head)),
  )
  model = ExitLM(dataclasses.replace(config, **changes))
  # Larger weights make confident exits and varied text out of a random model.
  return model, jax.tree.map(lambda x: x * 6, model.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnames='model')
def _all_logits(model, params, tokens):
  length = tokens.shape[1]
  positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  return logits_at_exits(model, params, tokens, jnp.ones_like(tokens), positions)


def _numpy_confidence(kind, logits):
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  ordered = np.sort(probs, axis=-1)
  match kind:
    case decode.Confidence.MAX_PROB:
      return ordered[..., -1]
    case decode.Confidence.MARGIN:
      return ordered[..., -1] - ordered[..., -2]
    case decode.Confidence.ENTROPY:
      return 1 + (probs * np.log(probs + 1e-300)).sum(-1) / np.log(probs.shape[-1])


def assert_is_oracle(model, params, prompt, completion, policy):
  """Each token is what a full cache-free pass over the tokens before it gives at the first exit
  whose confidence is above its threshold.

  By induction over the tokens this is equality with the oracle that generates one by one.
  """
  sequence = [*prompt, *completion.tokens.tolist()]
  padded = np.zeros((1, 64), np.int32)
  padded[0, : len(sequence)] = sequence
  logits = np.asarray(_all_logits(model, params, padded), np.float64)[:, 0]
  thresholds = np.float32(policy.thresholds(model.config))
  confidence = _numpy_confidence(policy.confidence, logits)
  for i, (token, layer) in enumerate(zip(completion.tokens, completion.exit_layers, strict=True)):
    at = len(prompt) + i - 1
    chosen = model.config.depths.index(layer)
    # float32 leaves a choice only where a confidence meets its threshold or two scores tie.
    early = confidence[: len(thresholds), at]
    assert (early[:chosen] <= thresholds[:chosen] + TOLERANCE).all(), (i, early)
    assert chosen == len(logits) - 1 or early[chosen] > thresholds[chosen] - TOLERANCE, (i, early)
    assert logits[chosen, at, token] > logits[chosen, at].max() - 10 * TOLERANCE, i
    assert abs(completion.confidences[i] - confidence[chosen, at]) < TOLERANCE, i


@pytest.fixture(scope='session')
def tiny():
  return make_tiny


@pytest.fixture(scope='session')
def is_oracle():
  return assert_is_oracle


@pytest.fixture(scope='session')
def all_logits():
  return _all_logits


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1], [30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(scope='session')
def prompts():
  """Four prompts of different lengths."""
  return PROMPTS
