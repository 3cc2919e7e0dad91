from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from exitax import checkpoint, data, models, parallel
from exitax.errors import UserError

CONFIG = models.ModelConfig(
  vocab_size=264,
  num_layers=2,
  embed_dim=16,
  num_heads=2,
  mlp_dim=16,
  max_length=16,
  exits=(models.ExitConfig(layer=1, head='mlp'),),
)
RULES = parallel.ShardingRules()


def _params():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(models.ExitLM(CONFIG).init, jax.random.key(0))
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def _mesh(**sizes):
  return parallel.make_mesh(parallel.MeshConfig(**sizes))


@pytest.fixture
def model_dir(tmp_path):
  """A model directory with checkpoints of steps 3 and 5."""
  checkpoint.write_model(tmp_path, CONFIG, data.ByteTokenizer())
  with checkpoint.CheckpointManager(checkpoint.checkpoints_directory(tmp_path)) as manager:
    for step in (3, 5):
      params = jax.tree.map(lambda x, step=step: x + step, _params())
      manager.save(step, {'step': np.int32(step), 'params': params, 'opt_state': np.ones(4)})
  return tmp_path


def test_what_is_written_is_read(tmp_path):
  checkpoint.write_model(tmp_path / 'new', CONFIG, data.ByteTokenizer())
  config, tokenizer = checkpoint.read_model(tmp_path / 'new')
  assert config == CONFIG
  assert tokenizer.digest == data.ByteTokenizer.digest


@pytest.mark.parametrize(('step', 'wanted'), [(None, 5), (3, 3)])
def test_loads_parameters_sharded_over_any_mesh(model_dir, step, wanted):
  loaded = checkpoint.load_model(model_dir, mesh=_mesh(data=4, tensor=2), rules=RULES, step=step)
  assert (loaded.step, loaded.directory, loaded.model.config) == (wanted, model_dir, CONFIG)
  jax.tree.map(
    lambda got, want: np.testing.assert_array_equal(got, want + wanted), loaded.params, _params()
  )
  up = loaded.params['blocks']['mlp']['up']['kernel']
  assert up.addressable_shards[0].data.size == up.size // 8


def test_loads_some_exits(tmp_path):
  exits = tuple(
    models.ExitConfig(layer=layer, head=head, matrix=matrix)
    for layer, head, matrix in [(1, 'mlp', 'own'), (2, 'norm', 'shared'), (3, 'norm', 'final')]
  )
  config = dataclasses.replace(CONFIG, num_layers=4, exits=exits)
  params = models.ExitLM(config).init(jax.random.key(0))
  checkpoint.write_model(tmp_path, config, data.ByteTokenizer())
  with checkpoint.CheckpointManager(checkpoint.checkpoints_directory(tmp_path)) as manager:
    manager.save(1, {'step': np.int32(1), 'params': params})
  tokens = np.arange(8)[None]
  whole = models.logits_at_exits(
    models.ExitLM(config), params, tokens, np.ones_like(tokens), tokens
  )
  for layers, rows in [((1, 3), [0, 2, 3]), ((2,), [1, 3]), ((), [3])]:
    loaded = checkpoint.load_model(tmp_path, mesh=_mesh(data=8), rules=RULES, exits=layers)
    assert loaded.model.config.depths == (*layers, 4)
    assert set(loaded.params.get('exits', {})) == set(map(str, layers))
    assert ('shared_exit' in loaded.params) == (2 in layers)
    logits = models.logits_at_exits(
      loaded.model, loaded.params, tokens, np.ones_like(tokens), tokens
    )
    np.testing.assert_allclose(logits, whole[np.asarray(rows)], rtol=0, atol=1e-6)
  with pytest.raises(
    UserError, match='no exit after layer 4; there are exits after layers 1, 2, 3'
  ):
    checkpoint.load_model(tmp_path, mesh=_mesh(data=8), rules=RULES, exits=(1, 4))


def test_a_mesh_that_does_not_fit_is_named(model_dir):
  with pytest.raises(UserError, match='tensor=8 does not divide num_heads=2'):
    checkpoint.load_model(model_dir, mesh=_mesh(data=1, tensor=8), rules=RULES)


def test_writing_again_changes_nothing(model_dir):
  before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (model_dir / 'tokenizer').iterdir()}
  content = (model_dir / 'model.json').read_bytes()
  checkpoint.write_model(model_dir, CONFIG, data.ByteTokenizer())
  after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (model_dir / 'tokenizer').iterdir()}
  assert after == before
  assert (model_dir / 'model.json').read_bytes() == content


def test_a_write_cut_short_is_done_again(model_dir):
  """model.json comes last: a tokenizer without it may be half a tokenizer."""
  (model_dir / 'model.json').unlink()
  for path in (model_dir / 'tokenizer').iterdir():
    path.write_bytes(path.read_bytes()[:10])
  checkpoint.write_model(model_dir, CONFIG, data.ByteTokenizer())
  assert checkpoint.read_model(model_dir)[0] == CONFIG


def test_how_it_is_computed_may_change(model_dir):
  changed = dataclasses.replace(CONFIG, precision='bfloat16', remat='full', max_length=32)
  checkpoint.write_model(model_dir, changed, data.ByteTokenizer())
  assert checkpoint.read_model(model_dir)[0] == changed


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'num_layers': 3},
      'holds a model with num_layers=2, the configuration says 3: change it back',
    ),
    ({'exits': ()}, r'holds a model with exits=\[.*\], the configuration says \[\]'),
    ({'norm_epsilon': 1e-6}, 'norm_epsilon=1e-05, the configuration says 1e-06'),
  ],
)
def test_another_model_is_refused(model_dir, changes, message):
  before = (model_dir / 'model.json').read_bytes()
  with pytest.raises(UserError, match=message):
    checkpoint.write_model(model_dir, dataclasses.replace(CONFIG, **changes), data.ByteTokenizer())
  assert (model_dir / 'model.json').read_bytes() == before


def _other_tokenizer():
  return data.BpeTokenizer.train(['some words, and some more words'] * 4, vocab_size=262)


def test_another_tokenizer_is_refused(model_dir):
  with pytest.raises(UserError, match='was made with another tokenizer'):
    checkpoint.write_model(model_dir, CONFIG, _other_tokenizer())
  assert checkpoint.read_model(model_dir)[0] == CONFIG


def test_an_exchanged_tokenizer_is_noticed(model_dir):
  for path in (model_dir / 'tokenizer').iterdir():
    path.unlink()
  _other_tokenizer().save(model_dir / 'tokenizer')
  with pytest.raises(UserError, match='does not match checkpoint'):
    checkpoint.read_model(model_dir)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, r'model\.json does not exist: name the model directory'),
    ('{"format": 1, "mod', r'model\.json is not valid JSON'),
    ('[]', 'is not a model file of format 1'),
    ('{"format": 2}', 'is not a model file of format 1'),
    ('{"format": 1}', 'is not a model file of format 1'),
    ('{"format": 1, "model": {}, "tokenizer_digest": null}', 'is not a model file of format 1'),
  ],
)
def test_a_damaged_model_file_is_named(model_dir, content, message):
  path = model_dir / 'model.json'
  path.unlink() if content is None else path.write_text(content)
  with pytest.raises(UserError, match=message):
    checkpoint.read_model(model_dir)
  if content is not None:
    with pytest.raises(UserError, match=message):
      checkpoint.write_model(model_dir, CONFIG, data.ByteTokenizer())


def test_a_configuration_of_another_version_is_named(model_dir):
  path = model_dir / 'model.json'
  content = json.loads(path.read_text())
  content['model']['num_experts'] = 8
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=r'does not fit this version of exitax.*num_experts'):
    checkpoint.read_model(model_dir)


def test_no_checkpoint_is_named(tmp_path):
  checkpoint.write_model(tmp_path, CONFIG, data.ByteTokenizer())
  with pytest.raises(UserError, match='holds no finished checkpoint'):
    checkpoint.load_model(tmp_path, mesh=_mesh(), rules=RULES)
