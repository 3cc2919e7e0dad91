"""The same weights in Hugging Face's models give the same logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from exitax import models
from exitax.layers import RopeConfig, RopeScaling
from exitax.models import ExitLM, ModelConfig

torch = pytest.importorskip('torch', reason='needs the bench extra: make install-dev')
transformers = pytest.importorskip('transformers', reason='needs the bench extra: make install-dev')

LENGTH = 24
BASE = ModelConfig(
  vocab_size=48,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  max_length=64,
  norm_epsilon=1e-5,
  tie_embeddings=False,
)
SIZES = {
  'vocab_size': 48,
  'num_hidden_layers': 2,
  'hidden_size': 16,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'intermediate_size': 24,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': False,
  'attn_implementation': 'eager',
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A model of both libraries."""

  family: str
  config: ModelConfig
  options: dict[str, Any]


def _rope(kind: str, **values: Any) -> dict[str, Any]:
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': 10_000.0, **values}}


CASES = {
  'llama': Case('Llama', BASE, {}),
  'llama tied, biases': Case(
    'Llama',
    dataclasses.replace(BASE, tie_embeddings=True, qkv_bias=True, output_bias=True),
    {'tie_word_embeddings': True, 'attention_bias': True},
  ),
  'llama linear': Case(
    'Llama',
    dataclasses.replace(BASE, rope=RopeConfig(scaling=RopeScaling.LINEAR, factor=4.0)),
    _rope('linear', factor=4.0),
  ),
  'llama 3': Case(
    'Llama',
    dataclasses.replace(
      BASE, rope=RopeConfig(scaling=RopeScaling.LLAMA3, factor=8.0, original_length=16)
    ),
    _rope(
      'llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  'llama yarn': Case(
    'Llama',
    dataclasses.replace(
      BASE, rope=RopeConfig(scaling=RopeScaling.YARN, factor=4.0, original_length=16)
    ),
    _rope('yarn', factor=4.0, original_max_position_embeddings=16),
  ),
  'mistral': Case('Mistral', dataclasses.replace(BASE, sliding_window=5), {'sliding_window': 5}),
  'qwen2': Case('Qwen2', dataclasses.replace(BASE, head_dim=4, qkv_bias=True), {'head_dim': 4}),
  'qwen3': Case('Qwen3', dataclasses.replace(BASE, qk_norm=True), {}),
}


def _theirs(case: Case) -> Any:
  """Their model, every tensor random: norm scales and biases too."""
  config_class = getattr(transformers, f'{case.family}Config')
  model = getattr(transformers, f'{case.family}ForCausalLM')(
    config_class(**{**SIZES, **case.options})
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      mean = 1.0 if 'norm' in name else 0.0
      tensor.copy_(mean + 0.3 * torch.randn(tensor.shape, generator=generator))
  return model.eval()


def _params(case: Case, weights: dict[str, np.ndarray]) -> Any:
  """Their weights as ours: torch keeps `[out, in]`, we keep `[in, heads, head_dim]`."""
  config = case.config
  used: set[str] = set()

  def take(name: str) -> np.ndarray:
    used.add(name)
    return weights[name]

  def linear(name: str, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None) -> Any:
    layer = {'kernel': take(f'{name}.weight').T.reshape(shape)}
    return (
      layer if bias_shape is None else {**layer, 'bias': take(f'{name}.bias').reshape(bias_shape)}
    )

  def block(index: int) -> Any:
    prefix = f'model.layers.{index}.'
    width, dim = config.embed_dim, config.head_dim
    attention = {}
    for ours, theirs, heads in (
      ('query', 'q', config.num_heads),
      ('key', 'k', config.num_kv_heads),
      ('value', 'v', config.num_kv_heads),
    ):
      bias = (heads, dim) if config.qkv_bias else None
      attention[ours] = linear(f'{prefix}self_attn.{theirs}_proj', (width, heads, dim), bias)
    attention['output'] = linear(
      f'{prefix}self_attn.o_proj',
      (config.num_heads, dim, width),
      (width,) if config.output_bias else None,
    )
    if config.qk_norm:
      attention['query_norm'] = {'scale': take(f'{prefix}self_attn.q_norm.weight')}
      attention['key_norm'] = {'scale': take(f'{prefix}self_attn.k_norm.weight')}
    mlp = {
      name: {'kernel': take(f'{prefix}mlp.{name}_proj.weight').T} for name in ('gate', 'up', 'down')
    }
    return {
      'attention': attention,
      'attention_norm': {'scale': take(f'{prefix}input_layernorm.weight')},
      'mlp': mlp,
      'mlp_norm': {'scale': take(f'{prefix}post_attention_layernorm.weight')},
    }

  blocks = [block(index) for index in range(config.num_layers)]
  params = {
    'embed': {'matrix': take('model.embed_tokens.weight')},
    'blocks': jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
    'norm': {'scale': take('model.norm.weight')},
  }
  if not config.tie_embeddings:
    params['head'] = {'matrix': take('lm_head.weight')}
  assert used == set(weights)
  return params


@pytest.mark.parametrize('name', CASES)
def test_logits_are_theirs(name):
  case = CASES[name]
  theirs = _theirs(case)
  tokens = np.random.default_rng(0).integers(0, 48, (2, LENGTH))
  with torch.no_grad():
    wanted = theirs(torch.tensor(tokens)).logits.numpy()
  weights = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
  model, params = ExitLM(case.config), _params(case, weights)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  program = jax.jit(lambda *batch: models.logits_at_exits(model, params, *batch))
  got = program(tokens.astype(np.int32), np.ones_like(positions), positions)[-1]
  np.testing.assert_allclose(got, wanted, atol=1e-4 * float(np.abs(wanted).max()))
