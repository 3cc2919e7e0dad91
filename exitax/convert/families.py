"""Architectures: `config.json` to `ModelConfig`, and back.

Llama, Mistral, Qwen2 and Qwen3 are one block with four switches: biases on q, k, v (Qwen2; Llama's
`attention_bias` adds the output's), norms on queries and keys (Qwen3), a sliding window (Mistral).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from exitax.errors import UserError
from exitax.layers import Precision, RopeConfig, RopeScaling
from exitax.models import ModelConfig

ARCHITECTURES = {
  'LlamaForCausalLM': 'llama',
  'MistralForCausalLM': 'mistral',
  'Qwen2ForCausalLM': 'qwen2',
  'Qwen3ForCausalLM': 'qwen3',
}
_CLASSES = {model_type: name for name, model_type in ARCHITECTURES.items()}
# What transformers assumes where config.json is silent.
_THETA = 10_000.0
_MISTRAL_WINDOW = 4096
_QWEN3_HEAD_DIM = 128


def model_config(config: Mapping[str, Any]) -> ModelConfig:
  """The model that a `config.json` describes, without exits.

  Raises:
    UserError: an architecture that is not known, or something that the block cannot do.
  """
  family = _family(config)
  _refuse_what_differs(config, family)
  biased = family in ('llama', 'qwen3') and config.get('attention_bias', False)
  numbers: dict[str, Any] = {
    ours: _number(config, theirs)
    for ours, theirs in {
      'vocab_size': 'vocab_size',
      'num_layers': 'num_hidden_layers',
      'embed_dim': 'hidden_size',
      'num_heads': 'num_attention_heads',
      'mlp_dim': 'intermediate_size',
      'max_length': 'max_position_embeddings',
    }.items()
  }
  return ModelConfig(
    **numbers,
    num_kv_heads=config.get('num_key_value_heads') or numbers['num_heads'],
    head_dim=config.get('head_dim') or (_QWEN3_HEAD_DIM if family == 'qwen3' else 0),
    rope=_rope(config),
    norm_epsilon=config.get('rms_norm_eps', 1e-6),
    qk_norm=family == 'qwen3',
    qkv_bias=family == 'qwen2' or biased,
    output_bias=biased,
    sliding_window=_window(config, family, numbers['num_layers']),
    tie_embeddings=config.get('tie_word_embeddings', False),
    init_std=config.get('initializer_range', 0.02),
  )


def huggingface_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
  """A `config.json` for a model that did not come from one, without its exits.

  Args:
    config: the model.
    dtype: of the weights, such as 'float32'.

  Raises:
    UserError: no architecture of transformers has its combination of features.
  """
  family = _family_of(config)
  content: dict[str, Any] = {
    'architectures': [_CLASSES[family]],
    'model_type': family,
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.embed_dim,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.mlp_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': config.max_length,
    'rms_norm_eps': config.norm_epsilon,
    'initializer_range': config.init_std,
    'tie_word_embeddings': config.tie_embeddings,
    'rope_parameters': _rope_parameters(config.rope),
    'dtype': dtype,
    'bos_token_id': None,
    'eos_token_id': None,
    'pad_token_id': None,
  }
  if family in ('llama', 'qwen3'):
    content['attention_bias'] = config.qkv_bias
  if family == 'mistral':
    content['sliding_window'] = config.sliding_window
  if family == 'qwen2' and config.sliding_window is not None:
    content |= {
      'use_sliding_window': True,
      'sliding_window': config.sliding_window,
      'max_window_layers': 0,
    }
  if family == 'qwen3':
    window = config.sliding_window
    content |= {
      'use_sliding_window': window is not None,
      'sliding_window': window,
      'max_window_layers': 0 if window is not None else config.num_layers,
    }
  return content


def source_precision(dtypes: set[str]) -> Precision:
  """Format of the computation for weights of these dtypes (names of the safetensors format)."""
  return Precision.BFLOAT16 if dtypes == {'BF16'} else Precision.FLOAT32


def with_length(config: ModelConfig, max_length: int | None) -> ModelConfig:
  """The model with a shorter context, if one is asked for.

  Raises:
    UserError: a longer one.
  """
  if max_length is None:
    return config
  if max_length > config.max_length:
    raise UserError(
      f'max_length={max_length} exceeds the {config.max_length} positions of the checkpoint: '
      'choose less, or change its rotary scaling'
    )
  return dataclasses.replace(config, max_length=max_length)


def _family(config: Mapping[str, Any]) -> str:
  names = config.get('architectures') or []
  for name in names:
    if name in ARCHITECTURES:
      return ARCHITECTURES[name]
  if not names and config.get('model_type') in ARCHITECTURES.values():
    return config['model_type']
  found = ', '.join(map(str, names)) or config.get('model_type') or 'none named'
  raise UserError(
    f'architecture {found} is not known: exitax reads {", ".join(ARCHITECTURES)} '
    '(and what is published under these names)'
  )


def _family_of(config: ModelConfig) -> str:
  """The architecture that has a model's switches."""
  biases = (config.qkv_bias, config.output_bias)
  if config.qk_norm and biases in ((False, False), (True, True)):
    return 'qwen3'
  if not config.qk_norm and biases == (True, False):
    return 'qwen2'
  if not config.qk_norm and config.sliding_window is not None and biases == (False, False):
    return 'mistral'
  if not config.qk_norm and config.sliding_window is None and biases[0] == biases[1]:
    return 'llama'
  raise UserError(
    f'no architecture of transformers has qk_norm={config.qk_norm}, qkv_bias={config.qkv_bias}, '
    f'output_bias={config.output_bias} and sliding_window={config.sliding_window} together'
  )


def _refuse_what_differs(config: Mapping[str, Any], family: str) -> None:
  activation = config.get('hidden_act', 'silu')
  if activation not in ('silu', 'swish'):
    raise UserError(f'hidden_act={activation!r} is not known: the blocks here are SwiGLU (silu)')
  if config.get('mlp_bias'):
    raise UserError('mlp_bias=true is not known: the MLP here has no biases')
  if family == 'qwen2' and config.get('attention_bias', True) is False:
    raise UserError('attention_bias=false does not exist in Qwen2: mend config.json')
  if config.get('quantization_config'):
    method = config['quantization_config'].get('quant_method', 'unknown')
    raise UserError(f'the weights are quantised ({method}): take the original weights')


def _window(config: Mapping[str, Any], family: str, num_layers: int) -> int | None:
  """The sliding window of all layers; transformers can give each layer its own."""
  window = config.get('sliding_window', _MISTRAL_WINDOW if family == 'mistral' else None)
  if family == 'llama' or window is None:
    return None
  if family == 'mistral':
    return int(window)
  types = config.get('layer_types')
  if not config.get('use_sliding_window', False):
    types = ['full_attention']
  elif types is None:
    full = min(config.get('max_window_layers', 28), num_layers)
    types = ['full_attention'] * full + ['sliding_attention'] * (num_layers - full)
  kinds = set(types)
  if kinds == {'full_attention'}:
    return None
  if kinds == {'sliding_attention'}:
    return int(window)
  raise UserError(
    f'{types.count("sliding_attention")} of {num_layers} layers have a sliding window: '
    'all layers have the same one here'
  )


def _rope(config: Mapping[str, Any]) -> RopeConfig:
  """Rotary settings in either dialect: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
  values = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
  theta = values.get('rope_theta', config.get('rope_theta', _THETA))
  kind = values.get('rope_type', values.get('type', 'default'))
  if values.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0)) != 1.0:
    raise UserError('partial_rotary_factor other than 1 is not known: all channels turn here')
  # As transformers: a scaling that names no original length starts from the configured one.
  original = int(
    values.get('original_max_position_embeddings') or config.get('max_position_embeddings', 8192)
  )
  try:
    return _scaled(kind, theta, values, original)
  except KeyError as error:
    raise UserError(f'rope_type={kind!r} needs {error} in config.json') from None


def _scaled(kind: str, theta: float, values: Mapping[str, Any], original: int) -> RopeConfig:
  match kind:
    case 'default':
      return RopeConfig(theta=theta)
    case 'linear':
      return RopeConfig(theta=theta, scaling=RopeScaling.LINEAR, factor=values['factor'])
    case 'llama3':
      return RopeConfig(
        theta=theta,
        scaling=RopeScaling.LLAMA3,
        factor=values['factor'],
        original_length=original,
        low_frequency_factor=values['low_freq_factor'],
        high_frequency_factor=values['high_freq_factor'],
      )
    case 'yarn':
      if values.get('mscale') or values.get('truncate') is False:
        raise UserError("yarn's mscale and truncate=false are not known: only the paper's form is")
      return RopeConfig(
        theta=theta,
        scaling=RopeScaling.YARN,
        factor=values['factor'],
        original_length=original,
        beta_fast=values.get('beta_fast') or 32.0,
        beta_slow=values.get('beta_slow') or 1.0,
        attention_factor=values.get('attention_factor'),
      )
  raise UserError(f'rope_type={kind!r} is not known: choose default, linear, llama3 or yarn')


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
  content: dict[str, Any] = {'rope_theta': rope.theta}
  match rope.scaling:
    case RopeScaling.NONE:
      return {**content, 'rope_type': 'default'}
    case RopeScaling.LINEAR:
      return {**content, 'rope_type': 'linear', 'factor': rope.factor}
    case RopeScaling.LLAMA3:
      return {
        **content,
        'rope_type': 'llama3',
        'factor': rope.factor,
        'original_max_position_embeddings': rope.original_length,
        'low_freq_factor': rope.low_frequency_factor,
        'high_freq_factor': rope.high_frequency_factor,
      }
    case RopeScaling.YARN:
      yarn = {
        **content,
        'rope_type': 'yarn',
        'factor': rope.factor,
        'original_max_position_embeddings': rope.original_length,
        'beta_fast': rope.beta_fast,
        'beta_slow': rope.beta_slow,
      }
      factor = rope.attention_factor
      return yarn if factor is None else {**yarn, 'attention_factor': factor}


def _number(config: Mapping[str, Any], name: str) -> int:
  value = config.get(name)
  if not isinstance(value, int):
    raise UserError(f'config.json has {name}={value!r}: a whole number is needed')
  return value
