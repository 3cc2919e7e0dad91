"""Adapters: what they add, that they add nothing at first, and that merging them changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.errors import UserError
from exitax.layers import LORA_LEAVES, HeadKind, LoraConfig, Precision, merge_lora
from exitax.models import ExitConfig, ExitLM, ExitMatrix, ModelConfig, logits_at_exits

CONFIG = ModelConfig(
  vocab_size=32,
  num_layers=3,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
  max_length=32,
  qkv_bias=True,
  exits=(ExitConfig(layer=1, head=HeadKind.LAYER, matrix=ExitMatrix.FINAL),),
  lora=LoraConfig(rank=3, alpha=6.0),
)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12))


def draw(model: ExitLM):
  """Parameters in which adapters add something."""
  rng = np.random.default_rng(1)
  wide = np.float64 if model.config.precision is Precision.FLOAT64 else np.float32
  return jax.tree.map(
    lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(wide), model.abstract_params()
  )


def scores(model: ExitLM, params) -> np.ndarray:
  ones = jnp.ones(TOKENS.shape, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
  return np.asarray(
    jax.jit(logits_at_exits, static_argnums=0)(model, params, TOKENS, ones, positions)
  )


def test_they_add_nothing_at_first() -> None:
  model, plain = ExitLM(CONFIG), ExitLM(dataclasses.replace(CONFIG, lora=None))
  params = model.init(jax.random.key(0))
  query = params['blocks']['attention']['query']
  assert query['lora_a'].shape == (3, 16, 3)
  assert query['lora_b'].shape == (3, 3, 4, 4)
  assert np.abs(query['lora_a']).max() <= 1 / 4 < 1.1 * np.abs(query['lora_a']).max()
  assert not query['lora_b'].any()
  merged = merge_lora(params, CONFIG.lora)
  assert jax.tree.structure(merged) == jax.tree.structure(plain.abstract_params())
  assert np.array_equal(scores(model, params), scores(plain, merged))


def test_merged_and_unmerged_are_the_same_in_float64() -> None:
  with jax.enable_x64(True):
    config = dataclasses.replace(CONFIG, precision=Precision.FLOAT64)
    model, plain = ExitLM(config), ExitLM(dataclasses.replace(config, lora=None))
    params = draw(model)
    found, merged = scores(model, params), merge_lora(params, config.lora)
    np.testing.assert_allclose(scores(plain, merged), found, atol=1e-10)
    without = jax.tree.map_with_path(
      lambda path, leaf: leaf * 0 if path[-1].key in LORA_LEAVES else leaf, params
    )
    assert np.abs(scores(model, without) - found).max() > 0.1  # They do add something.
    kernel, a, b = (
      params['blocks']['attention']['output'][name][1] for name in ('kernel', *LORA_LEAVES)
    )
    wanted = kernel + 2.0 * np.einsum('hkr,re->hke', a, b)
    np.testing.assert_allclose(merged['blocks']['attention']['output']['kernel'][1], wanted)


def test_only_targets_have_them_and_heads_have_none() -> None:
  lora = LoraConfig(rank=2, targets=('query', 'down'))
  params = ExitLM(dataclasses.replace(CONFIG, lora=lora)).abstract_params()
  adapted = {
    '/'.join(key.key for key in path[:-1])
    for path, _ in jax.tree.leaves_with_path(params)
    if path[-1].key in LORA_LEAVES
  }
  assert adapted == {'blocks/attention/query', 'blocks/mlp/down'}


@pytest.mark.parametrize('strategy', ['full', 'speculative'])
def test_decoding_adds_them_to_the_weights(strategy: str) -> None:
  model = ExitLM(CONFIG)
  params = draw(model)
  plain = ExitLM(dataclasses.replace(CONFIG, lora=None))
  policy = decode.StrategySettings(strategy=strategy).policy(CONFIG)
  texts = [
    decode.generate(each, own, [[1, 2, 3], [4]], max_new_tokens=12, policy=policy)
    for each, own in ((model, params), (plain, merge_lora(params, CONFIG.lora)))
  ]
  assert [list(c.tokens) for c in texts[0].completions] == [
    list(c.tokens) for c in texts[1].completions
  ]
  # And they are those of the unmerged model, scored whole.
  first = texts[0].completions[0]
  prompt = np.asarray([[1, 2, 3, *first.tokens]])
  ones, positions = jnp.ones(prompt.shape, jnp.int32), jnp.arange(prompt.shape[1])[None]
  best = logits_at_exits(model, params, prompt, ones, positions)[-1, 0].argmax(-1)
  assert list(best[2:-1]) == list(first.tokens)


def test_configurations_that_make_no_sense() -> None:
  with pytest.raises(UserError, match=r'LoraConfig\.rank=0'):
    LoraConfig(rank=0)
  with pytest.raises(UserError, match='must be some of query, key'):
    LoraConfig(targets=('q_proj',))
  again = ModelConfig.from_dict(CONFIG.to_dict())
  assert again == CONFIG
