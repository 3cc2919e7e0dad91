"""Group Think on an imported model, against transformers on the flattened text with the same mask and positions."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from exitax.convert import load_huggingface, open_source
from exitax.decode import Group, Sampler, Sees, ThinkConfig, Thinker
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from tests.convert.conftest import WHY, MakeFn
from tests.decode.group_oracle import run_groups, sees

torch = pytest.importorskip('torch', reason=WHY)
transformers = pytest.importorskip('transformers', reason=WHY)


@pytest.mark.parametrize('mode', ['full', 'strict', 'lag:2'])
def test_scores_are_those_of_transformers(make_folder: MakeFn, mode: str) -> None:
  folder = make_folder('llama')
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  loaded = load_huggingface(open_source(folder), mesh=mesh, rules=ShardingRules())
  sampler = Sampler(temperature=1.0)
  group = Group(
    prompt=[5, 3, 8, 9, 2, 6],
    thinkers=[Thinker(header=(10 + i,), seed=i, sampler=sampler) for i in range(3)],
    sees=Sees.parse(mode),
  )
  config = ThinkConfig(max_new_tokens=6, slot_width=8)
  _, fed = run_groups(loaded.model, loaded.params, [group], config)
  own = [item for item in fed if item.step >= 0]
  length = len(group.prompt)
  tokens = [*group.prompt, *(item.token for item in own)]
  positions = [*range(length), *(length + 8 * item.text + item.step for item in own)]
  mask = np.tri(len(tokens), dtype=bool)
  for i, query in enumerate(own):
    for j, key in enumerate(own):
      mask[length + i, length + j] = (
        key.step <= query.step
        if key.text == query.text
        else sees(mode, other=(key.step, key.text), query=(query.step, query.text))
      )
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
  added = torch.where(torch.asarray(mask), 0.0, torch.finfo(torch.float32).min)
  with torch.no_grad():
    scores = model(
      torch.asarray([tokens]),
      attention_mask=added[None, None],
      position_ids=torch.asarray([positions]),
    ).logits[0]
  found = np.stack([item.scores for item in own])
  np.testing.assert_allclose(found, scores[length:].numpy(), rtol=0, atol=1e-4)
