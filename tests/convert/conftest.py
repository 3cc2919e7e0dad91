"""Small Hugging Face models of every architecture, each tensor random, and their tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

WHY = 'needs the bench extra: make install-dev'
VOCAB = 96
_SIZES = {
  'vocab_size': VOCAB,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 128,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500_000.0,
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
_YARN = {
  'rope_type': 'yarn',
  'rope_theta': 10_000.0,
  'factor': 4.0,
  'original_max_position_embeddings': 32,
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A configuration of one architecture."""

  kind: str
  changes: dict[str, Any]


VARIANTS = {
  'llama': Variant('Llama', {}),
  'llama_biases': Variant('Llama', {'attention_bias': True, 'tie_word_embeddings': True}),
  'llama_head_dim': Variant('Llama', {'head_dim': 16, 'num_key_value_heads': 4}),
  'llama_linear': Variant(
    'Llama', {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}}
  ),
  'llama_3': Variant('Llama', {'rope_parameters': _LLAMA3}),
  'llama_yarn': Variant('Llama', {'rope_parameters': _YARN}),
  'llama_yarn_factor': Variant(
    'Llama', {'rope_parameters': {**_YARN, 'attention_factor': 1.3, 'beta_fast': 16.0}}
  ),
  'mistral': Variant('Mistral', {'sliding_window': 7}),
  'mistral_full': Variant('Mistral', {'sliding_window': None, 'head_dim': 16}),
  'qwen2': Variant('Qwen2', {'tie_word_embeddings': True, 'rms_norm_eps': 1e-6}),
  'qwen2_window': Variant(
    'Qwen2', {'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 0}
  ),
  'qwen3': Variant('Qwen3', {'head_dim': 16, 'rms_norm_eps': 1e-6}),
  'qwen3_biases': Variant('Qwen3', {'head_dim': 8, 'attention_bias': True}),
}

MakeFn = Callable[..., Path]


def make_config(name: str, **changes: Any) -> Any:
  """A transformers configuration."""
  transformers = pytest.importorskip('transformers', reason=WHY)
  variant = VARIANTS[name]
  kind = getattr(transformers, f'{variant.kind}Config')
  return kind(**{**_SIZES, **variant.changes, **changes})


def randomised(config: Any, *, seed: int = 0) -> Any:
  """A model with every tensor drawn anew: norms and biases that stayed at 1 and 0 would hide."""
  torch = pytest.importorskip('torch', reason=WHY)
  transformers = pytest.importorskip('transformers', reason=WHY)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
  return model


def write_tokenizer(folder: Path, *, vocab_size: int = VOCAB, template: bool = True) -> None:
  """A tokenizer of single characters, with <pad>, <s> and </s> at 0, 1 and 2."""
  specials = ['<pad>', '<s>', '</s>']
  characters = [chr(code) for code in range(0x21, 0x21 + vocab_size - len(specials))]
  vocabulary = {text: i for i, text in enumerate([*specials, *characters])}
  model = tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=characters[0])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.add_special_tokens(specials)
  tokenizer.decoder = tokenizers.decoders.Fuse()
  if template:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 1)]
    )
  tokenizer.save(str(folder / 'tokenizer.json'))
  content = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  names = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps({**content, **names}))


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFn:
  """`make_folder('llama', **changes)` writes a folder as `save_pretrained` does."""

  def make(name: str, *, dtype: Any = None, shard: str = '5GB', **changes: Any) -> Path:
    folder = tmp_path / f'hf-{name}'
    model = randomised(make_config(name, **changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder

  return make
