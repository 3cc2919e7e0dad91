"""LoRA adapters between exitax and PEFT, with equal scores in both directions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from exitax.checkpoint import LoadedModel, load_model
from exitax.convert import (
  from_huggingface,
  from_peft,
  load_huggingface,
  open_source,
  to_huggingface,
  to_peft,
)
from exitax.errors import UserError
from exitax.layers import LORA_LEAVES, LoraConfig
from exitax.models import ExitLM
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from tests.commands.conftest import RunCommand, exitax  # noqa: F401
from tests.convert.conftest import WHY, MakeFn
from tests.convert.test_oracle import own_logits, padded_batch, theirs

torch = pytest.importorskip('torch', reason=WHY)
peft = pytest.importorskip('peft', reason=WHY)

ALL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


def one_device() -> jax.sharding.Mesh:
  return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def load(folder: Path) -> LoadedModel:
  return load_huggingface(open_source(folder), mesh=one_device(), rules=ShardingRules())


def adapted_here(folder: Path, lora: LoraConfig) -> LoadedModel:
  """A model with adapters that add something."""
  plain = load(folder)
  model = ExitLM(dataclasses.replace(plain.model.config, lora=lora))
  rng = np.random.default_rng(3)

  def draw(path: Any, leaf: Any) -> Any:
    if path[-1].key in LORA_LEAVES:
      return jax.numpy.asarray(0.2 * rng.normal(size=leaf.shape), np.float32)
    node = plain.params
    for key in path:
      node = node[key.key]
    return node

  params = jax.tree.map_with_path(draw, model.abstract_params())
  return dataclasses.replace(plain, model=model, params=params)


def adapted_there(folder: Path, **settings: Any) -> Any:
  """A PEFT model with adapters that add something."""
  config = peft.LoraConfig(task_type='CAUSAL_LM', **settings)
  model = peft.get_peft_model(theirs(folder), config).eval()
  generator = torch.Generator().manual_seed(5)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'lora_' in name:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
  return model


def their_scores(model: Any) -> np.ndarray:
  tokens, mask = padded_batch()
  with torch.no_grad():
    return model(
      input_ids=torch.asarray(tokens), attention_mask=torch.asarray(mask.astype(np.int64))
    ).logits.numpy()[mask]


def our_scores(loaded: LoadedModel) -> np.ndarray:
  tokens, mask = padded_batch()
  return own_logits(loaded, tokens, mask)[mask]


@pytest.mark.parametrize('name', ['llama', 'qwen2', 'qwen3', 'mistral'])
def test_peft_loads_what_is_written_here(name: str, make_folder: MakeFn, tmp_path: Path) -> None:
  folder = make_folder(name)
  loaded = adapted_here(folder, LoraConfig(rank=3, alpha=7.0))
  to_peft(loaded, tmp_path / 'adapter', base=str(folder))
  model = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / 'adapter').eval()
  found = our_scores(loaded)
  np.testing.assert_allclose(their_scores(model), found, atol=1e-4, rtol=1e-4)
  assert np.abs(found - our_scores(load(folder))).max() > 0.1  # They do add something.


@pytest.mark.parametrize(
  'settings',
  [
    {'r': 4, 'lora_alpha': 8, 'target_modules': ALL},
    {'r': 2, 'lora_alpha': 3, 'target_modules': ['v_proj', 'q_proj']},
    {'r': 4, 'lora_alpha': 8, 'target_modules': ['o_proj', 'down_proj'], 'use_rslora': True},
  ],
  ids=str,
)
def test_what_peft_writes_is_read_here(
  settings: dict[str, Any], make_folder: MakeFn, tmp_path: Path
) -> None:
  folder = make_folder('llama_3')
  model = adapted_there(folder, **settings)
  model.save_pretrained(tmp_path / 'adapter')
  loaded = from_peft(load(folder), tmp_path / 'adapter')
  np.testing.assert_allclose(our_scores(loaded), their_scores(model), atol=1e-4, rtol=1e-4)
  to_peft(loaded, tmp_path / 'again', base=str(folder))
  again = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / 'again').eval()
  np.testing.assert_allclose(their_scores(again), their_scores(model), atol=1e-5, rtol=1e-5)


def test_adapters_leave_for_transformers_merged(make_folder: MakeFn, tmp_path: Path) -> None:
  folder = make_folder('llama')
  loaded = adapted_here(folder, LoraConfig(rank=2, targets=('query', 'up')))
  to_huggingface(loaded, tmp_path / 'merged')
  np.testing.assert_allclose(
    their_scores(theirs(tmp_path / 'merged')), our_scores(loaded), atol=1e-4, rtol=1e-4
  )


def test_commands(
  make_folder: MakeFn,
  tmp_path: Path,
  exitax: RunCommand,  # noqa: F811
) -> None:
  folder = make_folder('qwen3')
  base, adapter = tmp_path / 'base', tmp_path / 'adapter'
  from_huggingface(open_source(folder), base)
  adapted_there(folder, r=4, lora_alpha=8, target_modules=ALL).save_pretrained(adapter)
  found = exitax('convert', 'from-peft', adapter, tmp_path / 'adapted', f'--base={base}')
  assert (found.status, 'adapters of rank 4' in found.out) == (0, True)
  for way in ('to-peft', 'merge'):
    found = exitax('convert', way, tmp_path / 'adapted', tmp_path / way)
    assert (found.status, found.err) == (0, '')
  old, new = (
    json.loads((path / 'adapter_config.json').read_text())
    for path in (adapter, tmp_path / 'to-peft')
  )
  assert {old[k] == new[k] for k in ('r', 'lora_alpha', 'peft_type', 'bias')} == {True}
  assert set(old['target_modules']) == set(new['target_modules'])
  mesh, rules = one_device(), ShardingRules()
  merged = load_model(tmp_path / 'merge', mesh=mesh, rules=rules)
  assert merged.model.config.lora is None
  np.testing.assert_allclose(
    our_scores(merged),
    our_scores(load_model(tmp_path / 'adapted', mesh=mesh, rules=rules)),
    atol=1e-4,
    rtol=1e-4,
  )
  # The merged model still knows its way back.
  back = exitax('convert', 'to-hf', tmp_path / 'merge', tmp_path / 'back')
  assert back.status == 0
  np.testing.assert_allclose(
    their_scores(theirs(tmp_path / 'back')), our_scores(merged), atol=1e-4, rtol=1e-4
  )
  for command, message in {
    ('convert', 'to-peft', base, tmp_path / 'x'): 'has no adapters: train some',
    ('convert', 'merge', base, tmp_path / 'x'): 'there is nothing to merge',
    (
      'convert',
      'from-peft',
      adapter,
      tmp_path / 'x',
      f'--base={tmp_path / "adapted"}',
    ): 'has adapters already',
  }.items():
    found = exitax(*command)
    assert (found.status, message in found.err) == (2, True), found.err


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'peft_type': 'PREFIX_TUNING'}, 'holds PREFIX_TUNING'),
    ({'use_dora': True}, 'use_dora=True'),
    ({'target_modules': ['q_proj', 'lm_head']}, r"targets \['lm_head'\]"),
    ({'r': 3}, 'is it the adapter of another model'),
    ({'target_modules': ['q_proj']}, 'for which this model has no place'),
  ],
)
def test_adapters_that_do_not_fit_are_named(
  changes: dict[str, Any], message: str, make_folder: MakeFn, tmp_path: Path
) -> None:
  folder, adapter = make_folder('llama'), tmp_path / 'adapter'
  to_peft(adapted_here(folder, LoraConfig(rank=2, targets=('query', 'value'))), adapter)
  path = adapter / 'adapter_config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  with pytest.raises(UserError, match=message):
    from_peft(load(folder), adapter)
