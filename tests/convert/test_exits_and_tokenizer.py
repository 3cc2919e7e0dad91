"""What travels beside the backbone: exits, the tokenizer, the ids that end an answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import exitax as front
from exitax.checkpoint import LoadedModel, load_model
from exitax.convert import from_huggingface, load_huggingface, open_source, to_huggingface
from exitax.data import BpeTokenizer, ByteTokenizer, encode_prompt
from exitax.decode import Sampler
from exitax.errors import UserError
from exitax.models import ExitConfig, ExitLM, ModelConfig
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from tests.convert.conftest import WHY, MakeFn, write_tokenizer

torch = pytest.importorskip('torch', reason=WHY)
transformers = pytest.importorskip('transformers', reason=WHY)

RULES = ShardingRules()
EXITS = (
  ExitConfig(layer=1, head='embedding', matrix='final'),
  ExitConfig(layer=2, head='norm', matrix='shared'),
  ExitConfig(layer=3, head='mlp', matrix='own'),
  ExitConfig(layer=4, head='layer', matrix='input'),
)


def one_device() -> jax.sharding.Mesh:
  return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def test_exits_travel_beside_the_backbone(make_folder: MakeFn, tmp_path: Path) -> None:
  plain = load_huggingface(
    open_source(make_folder('qwen2', num_hidden_layers=5)), mesh=one_device(), rules=RULES
  )
  config = dataclasses.replace(plain.model.config, exits=EXITS)
  fresh = ExitLM(config).init(jax.random.key(1))
  params = {**fresh, **plain.params}
  loaded = LoadedModel(
    model=ExitLM(config),
    params=params,
    tokenizer=plain.tokenizer,
    step=0,
    directory=tmp_path / 'none',
  )
  to_huggingface(loaded, tmp_path / 'out')
  # For transformers it is a Qwen2 without anything missing or left over.
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert type(model).__name__ == 'Qwen2ForCausalLM'
  assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
  write_tokenizer(tmp_path / 'out')
  again = load_huggingface(open_source(tmp_path / 'out'), mesh=one_device(), rules=RULES)
  assert again.model.config.exits == EXITS
  assert jax.tree.structure(again.params) == jax.tree.structure(params)
  assert all(
    np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(params), strict=True)
  )


def test_a_sidecar_that_does_not_fit_is_named(make_folder: MakeFn, tmp_path: Path) -> None:
  test_exits_travel_beside_the_backbone(make_folder, tmp_path)
  out = tmp_path / 'out'
  content = json.loads((out / 'config.json').read_text())
  (out / 'config.json').write_text(json.dumps({**content, 'num_hidden_layers': 4}))
  with pytest.raises(UserError, match='exit layer 4 is out of range'):
    open_source(out)


def test_prompts_and_ends_are_those_of_the_checkpoint(make_folder: MakeFn, tmp_path: Path) -> None:
  folder = make_folder('llama')
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 7, 95]}))
  (folder / 'chat_template.jinja').write_text('{{ bos_token }}{{ messages[0].content }}')
  from_huggingface(open_source(folder), tmp_path / 'model')
  model = front.load(tmp_path / 'model')
  assert model.tokenizer.stop_ids == (2, 7, 95)
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  assert encode_prompt(model.tokenizer, 'abc') == auto('abc').input_ids
  to_huggingface(load_model(tmp_path / 'model', mesh=one_device(), rules=RULES), tmp_path / 'back')
  for name in ('generation_config.json', 'chat_template.jinja', 'tokenizer_config.json'):
    assert (tmp_path / 'back' / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
  ('content', 'sampler'),
  [
    ({}, Sampler()),
    ({'temperature': 0.5}, Sampler()),
    ({'do_sample': False, 'temperature': 0.5}, Sampler()),
    ({'do_sample': True}, Sampler(temperature=1.0)),
    (
      {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9, 'top_k': 20, 'repetition_penalty': 1.1},
      Sampler(temperature=0.6, top_p=0.9, top_k=20),
    ),
  ],
)
def test_it_is_sampled_as_its_makers_want(
  make_folder: MakeFn, tmp_path: Path, content: dict, sampler: Sampler
) -> None:
  folder = make_folder('llama')
  (folder / 'generation_config.json').write_text(json.dumps(content))
  from_huggingface(open_source(folder), tmp_path / 'model')
  model = front.load(tmp_path / 'model')
  assert model.default_sampler == sampler
  ask = {'max_new_tokens': 8, 'seed': 3}
  assert model.generate('abc', **ask) == model.generate('abc', sampler=sampler, **ask)


def test_a_sampling_value_that_is_no_number_is_named(make_folder: MakeFn, tmp_path: Path) -> None:
  folder = make_folder('llama')
  (folder / 'generation_config.json').write_text('{"do_sample": true, "top_k": "many"}')
  with pytest.raises(UserError, match=r"generation_config.json: top_k='many' is no number"):
    from_huggingface(open_source(folder), tmp_path / 'model')


def test_a_model_without_a_start_gets_none(make_folder: MakeFn) -> None:
  folder = make_folder('qwen3')
  write_tokenizer(folder, template=False)
  tokenizer = open_source(folder).tokenizer
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  assert encode_prompt(tokenizer, 'abc') == auto('abc').input_ids == tokenizer.encode('abc')
  assert len(encode_prompt(tokenizer, '')) == 1  # Something must be there to go on from.


def test_text_goes_on_as_with_transformers(make_folder: MakeFn, tmp_path: Path) -> None:
  folder = make_folder('llama_3')
  from_huggingface(open_source(folder), tmp_path / 'model')
  found = front.load(tmp_path / 'model').generate('abc', max_new_tokens=20)[0]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  ids = tokenizer('abc', return_tensors='pt').input_ids
  expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
  assert list(found.tokens) == expected.tolist()


def test_a_model_trained_here_becomes_one_of_transformers(tmp_path: Path) -> None:
  config = ModelConfig(
    vocab_size=264,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_length=64,
    exits=EXITS[:1],
  )
  model = ExitLM(config)
  params = model.init(jax.random.key(0))
  loaded = LoadedModel(
    model=model, params=params, tokenizer=ByteTokenizer(), step=3, directory=tmp_path / 'none'
  )
  to_huggingface(loaded, tmp_path / 'out')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert torch.equal(
    theirs.state_dict()['model.embed_tokens.weight'],
    torch.asarray(np.array(params['embed']['matrix'])),
  )
  assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (256, 257)


def test_a_tokenizer_trained_here_puts_its_start_in_front_for_others_too(tmp_path: Path) -> None:
  tokenizer = BpeTokenizer.train(['some text to learn from ' * 20], vocab_size=300)
  config = ModelConfig(
    vocab_size=300, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_length=64
  )
  model = ExitLM(config)
  loaded = LoadedModel(
    model=model,
    params=model.init(jax.random.key(0)),
    tokenizer=tokenizer,
    step=0,
    directory=tmp_path / 'model',
  )
  tokenizer.save(tmp_path / 'model' / 'tokenizer')
  to_huggingface(loaded, tmp_path / 'out')
  wanted = encode_prompt(tokenizer, 'some text')
  assert wanted[0] == tokenizer.bos_id
  auto = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert auto('some text').input_ids == wanted
  assert encode_prompt(open_source(tmp_path / 'out').tokenizer, 'some text') == wanted
