"""Decoding with matrices in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.layers import HeadKind, Int8

NEW = 16


def _dequantised(params):
  return jax.tree.map(
    lambda x: x.dequantise(jnp.float32) if isinstance(x, Int8) else x,
    params,
    is_leaf=lambda x: isinstance(x, Int8),
  )


@pytest.mark.parametrize('head', [HeadKind.NORM, HeadKind.LAYER])
@pytest.mark.parametrize(
  'policy',
  [decode.FullDepth(), decode.DeferredExit(threshold=0.55), decode.Speculative()],
  ids=repr,
)
def test_int8_weights_give_the_tokens_of_their_dequantised_copy(tiny, prompts, head, policy):
  model, params = tiny(head, qkv_bias=True)
  small = decode.prepare_params(model, params, weights=decode.WeightFormat.INT8)
  found = decode.generate(model, small, prompts, max_new_tokens=NEW, policy=policy)
  exact = decode.generate(model, _dequantised(small), prompts, max_new_tokens=NEW, policy=policy)
  assert found.tokens == exact.tokens
  for a, b in zip(found.completions, exact.completions, strict=True):
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-3)


def test_int8_weights_take_a_quarter_of_the_memory(tiny):
  model, params = tiny()
  whole = decode.prepare_params(model, params)
  small = decode.prepare_params(model, params, weights=decode.WeightFormat.INT8)
  sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (whole, small)]
  assert sizes[1] < sizes[0] / 2.5  # Scales weigh something at a width of 32.
  assert decode.prepare_params(model, small) is small
