"""Imported models against transformers: scores, greedy texts, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.checkpoint import LoadedModel, load_model
from exitax.convert import (
  from_huggingface,
  huggingface_config,
  load_huggingface,
  model_config,
  open_source,
  to_huggingface,
)
from exitax.models import logits_at_exits
from exitax.parallel import MeshConfig, ShardingRules, make_mesh, use
from tests.convert.conftest import VARIANTS, VOCAB, WHY, MakeFn

torch = pytest.importorskip('torch', reason=WHY)
transformers = pytest.importorskip('transformers', reason=WHY)

RULES = ShardingRules()
LENGTHS = (100, 61, 3)  # Longer than the rotary tables' original length and than every window.


def one_device() -> jax.sharding.Mesh:
  return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def load(folder: Path) -> LoadedModel:
  return load_huggingface(open_source(folder), mesh=one_device(), rules=RULES)


def theirs(folder: Path) -> Any:
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  )
  return model.eval()


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
  """Right-padded ids `[rows, length]` and the mask of those that are meant."""
  rng = np.random.default_rng(0)
  mask = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]
  return np.where(mask, rng.integers(3, VOCAB, mask.shape), 0), mask


def own_logits(loaded: LoadedModel, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  logits = jax.jit(logits_at_exits, static_argnums=0)(
    loaded.model,
    loaded.params,
    jnp.asarray(tokens),
    jnp.asarray(mask.astype(np.int32)),
    jnp.asarray(positions),
  )
  return np.asarray(logits[-1])


@pytest.mark.parametrize('name', VARIANTS)
def test_scores_are_those_of_transformers(name: str, make_folder: MakeFn) -> None:
  folder = make_folder(name)
  tokens, mask = padded_batch()
  with torch.no_grad():
    expected = theirs(folder)(
      input_ids=torch.asarray(tokens), attention_mask=torch.asarray(mask.astype(np.int64))
    ).logits.numpy()
  found = own_logits(load(folder), tokens, mask)
  np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', ['llama_3', 'llama_biases', 'mistral', 'qwen2', 'qwen3'])
def test_greedy_texts_are_those_of_transformers(name: str, make_folder: MakeFn) -> None:
  folder = make_folder(name)
  tokens, mask = padded_batch()
  prompts = [
    row[: min(int(count), 40)].tolist() for row, count in zip(tokens, mask.sum(1), strict=True)
  ]
  loaded, model = load(folder), theirs(folder)
  model.generation_config.eos_token_id = None
  found = decode.generate(loaded.model, loaded.params, prompts, max_new_tokens=64)
  for prompt, completion in zip(prompts, found.completions, strict=True):
    expected = model.generate(
      torch.asarray([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
    )[0, len(prompt) :]
    assert list(completion.tokens) == expected.tolist()


@pytest.mark.parametrize('name', VARIANTS)
def test_the_way_back_changes_nothing(name: str, make_folder: MakeFn, tmp_path: Path) -> None:
  folder, back = make_folder(name), tmp_path / 'back'
  from_huggingface(open_source(folder), tmp_path / 'model')
  to_huggingface(load_model(tmp_path / 'model', mesh=one_device(), rules=RULES), back)
  before, after = theirs(folder).state_dict(), theirs(back).state_dict()
  assert before.keys() == after.keys()
  for key, tensor in before.items():
    assert torch.equal(tensor, after[key]), key
  with torch.no_grad():
    tokens = torch.asarray(padded_batch()[0])
    assert torch.equal(theirs(folder)(tokens).logits, theirs(back)(tokens).logits)
  old, new = (json.loads((path / 'config.json').read_text()) for path in (folder, back))
  assert {**old, 'dtype': 0} == {**new, 'dtype': 0}
  assert (back / 'tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()
  tokenizer = transformers.AutoTokenizer.from_pretrained(back)
  assert tokenizer('abc').input_ids == [1, *open_source(folder).tokenizer.encode('abc')]


@pytest.mark.parametrize('name', VARIANTS)
def test_a_configuration_made_here_is_the_same_model(name: str, make_folder: MakeFn) -> None:
  config = model_config(json.loads((make_folder(name) / 'config.json').read_text()))
  content = huggingface_config(config, dtype='float32')
  assert model_config(content) == config
  kind = transformers.AutoConfig.for_model(content['model_type'])
  again = type(kind).from_dict(content).to_dict()
  assert model_config(again) == config


def test_shards_and_bfloat16(make_folder: MakeFn, tmp_path: Path) -> None:
  folder = make_folder('llama', dtype=torch.bfloat16, shard='20KB')
  assert len(list(folder.glob('*.safetensors'))) > 2
  source = open_source(folder)
  from_huggingface(source, tmp_path / 'model')
  loaded = load_model(tmp_path / 'model', mesh=one_device(), rules=RULES)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
  to_huggingface(loaded, tmp_path / 'back', shard_bytes=20_000)
  assert len(list((tmp_path / 'back').glob('*.safetensors'))) > 2
  before = transformers.AutoModelForCausalLM.from_pretrained(folder)
  after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back')
  assert after.dtype == torch.bfloat16
  for key, tensor in before.state_dict().items():
    assert torch.equal(tensor, after.state_dict()[key])


@pytest.mark.parametrize(
  'config', [MeshConfig(data=2, tensor=2), MeshConfig(data=1, tensor=4), MeshConfig(data=8)]
)
def test_each_device_reads_its_own_shards(config: MeshConfig, make_folder: MakeFn) -> None:
  folder = make_folder('qwen3', num_key_value_heads=4)
  size = int(np.prod(list(config.sizes.values())))
  mesh = make_mesh(config, jax.devices()[:size])
  with use(mesh, RULES):
    spread = load_huggingface(open_source(folder), mesh=mesh, rules=RULES)
  whole = load(folder)
  query = spread.params['blocks']['attention']['query']['kernel']
  assert query.addressable_shards[0].data.shape[2] == query.shape[2] // config.sizes['tensor']
  for path, leaf in jax.tree.leaves_with_path(whole.params):
    other = spread.params
    for key in path:
      other = other[key.key]
    assert np.array_equal(np.asarray(leaf), np.asarray(other)), path
