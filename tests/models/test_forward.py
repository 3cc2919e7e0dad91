from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import models
from exitax.layers import HeadKind, Precision, RopeConfig, RopeScaling, causal
from exitax.models import ExitConfig, ExitLM, ExitMatrix, ModelConfig

QUICK = {'xla_backend_optimization_level': 0}
CONFIG = ModelConfig(
  vocab_size=40,
  num_layers=3,
  embed_dim=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=20,
  max_length=16,
  tie_embeddings=False,
  precision=Precision.FLOAT64,
  exits=(
    ExitConfig(layer=1, head=HeadKind.LAYER, matrix=ExitMatrix.OWN),
    ExitConfig(layer=2, head=HeadKind.MLP, matrix=ExitMatrix.INPUT),
  ),
)


@pytest.fixture(scope='module', autouse=True)
def _several_blocks_of_queries():
  """Rows as short as these would otherwise be one block of the CPU's attention."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(causal, 'MIN_BLOCK', 3)
    yield


def test_mask_in_a_miniature():
  segment_ids = jnp.asarray([[1, 1, 2, 2, 2, 0]])
  positions = jnp.asarray([[0, 1, 0, 1, 2, 0]])
  mask = models.packed_mask(segment_ids, positions, None)
  np.testing.assert_array_equal(
    mask[0].astype(int),
    [
      [1, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0],
      [0, 0, 1, 0, 0, 0],
      [0, 0, 1, 1, 0, 0],
      [0, 0, 1, 1, 1, 0],
      [0, 0, 0, 0, 0, 1],
    ],
  )
  windowed = models.packed_mask(segment_ids, positions, 2)
  np.testing.assert_array_equal(windowed[0, 4].astype(int), [0, 0, 0, 1, 1, 0])
  np.testing.assert_array_equal(windowed[0, :4], mask[0, :4])


def _normed(x, scale, config):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale


def _reference(config: ModelConfig, params, tokens):
  """One document's logits at every exit by NumPy alone, one head and one query at a time."""
  params = jax.tree.map(np.asarray, params)
  length, half = len(tokens), config.head_dim // 2
  frequency = config.rope.theta ** (-np.arange(half) / half)
  phase = np.exp(1j * np.arange(length)[:, None] * frequency)
  group = config.num_heads // config.num_kv_heads
  window = config.sliding_window or length

  def turned(x):
    z = (x[:, :half] + 1j * x[:, half:]) * phase
    return np.concatenate([z.real, z.imag], -1)

  def mlp(x, p):
    gate = x @ p['gate']['kernel']
    return (gate / (1 + np.exp(-gate)) * (x @ p['up']['kernel'])) @ p['down']['kernel']

  def block(x, p):
    a, normed = p['attention'], _normed(x, p['attention_norm']['scale'], config)
    mixed = np.zeros_like(x)
    for h in range(config.num_heads):
      query = turned(normed @ a['query']['kernel'][:, h])
      key = turned(normed @ a['key']['kernel'][:, h // group])
      value = normed @ a['value']['kernel'][:, h // group]
      for i in range(length):
        seen = slice(max(0, i - window + 1), i + 1)
        weights = np.exp(key[seen] @ query[i] / math.sqrt(config.head_dim))
        mixed[i] += weights @ value[seen] / weights.sum() @ a['output']['kernel'][h]
    x = x + mixed
    return x + mlp(_normed(x, p['mlp_norm']['scale'], config), p['mlp'])

  x = params['embed']['matrix'][tokens]
  hidden = {}
  for layer in range(config.num_layers):
    x = block(x, jax.tree.map(lambda leaf, i=layer: leaf[i], params['blocks']))
    hidden[layer + 1] = x
  first = params['exits']['1']
  features = block(hidden[1], first['head']['block'])
  logits = [_normed(features, first['head']['norm']['scale'], config) @ first['matrix'].T]
  second = params['exits']['2']['head']
  features = hidden[2]
  features = features + mlp(_normed(features, second['mlp_norm']['scale'], config), second['mlp'])
  features = _normed(features, second['norm']['scale'], config)
  logits.append(features @ params['embed']['matrix'].T)
  logits.append(_normed(x, params['norm']['scale'], config) @ params['head']['matrix'].T)
  return np.stack(logits)


@pytest.mark.parametrize('sliding_window', [None, 3])
def test_packed_rows_are_each_document_alone_by_numpy(
  x64, random_params, packed_batch, sliding_window
):
  config = dataclasses.replace(CONFIG, sliding_window=sliding_window)
  model = ExitLM(config)
  params = random_params(model)
  batch = packed_batch((3, 5), (6,), vocab_size=40)
  logits = jax.jit(
    lambda params: models.logits_at_exits(model, params, **batch), compiler_options=QUICK
  )(params)
  assert logits.shape == (3, 2, 8, 40)
  for row, start, size in ((0, 0, 3), (0, 3, 5), (1, 0, 6)):
    wanted = _reference(config, params, batch['tokens'][row, start : start + size])
    np.testing.assert_allclose(logits[:, row, start : start + size], wanted, atol=1e-11)
  assert np.isfinite(logits).all()


def test_documents_never_see_each_other(random_params, packed_batch):
  """Another document in the same row changes no bit; the gradient between them is exactly zero."""
  config = dataclasses.replace(CONFIG, precision=Precision.FLOAT32)
  model = ExitLM(config)
  params = random_params(model)
  batch = packed_batch((3, 5), (6,), vocab_size=40)

  @jax.jit
  def logits_of(tokens):
    return models.logits_at_exits(model, params, **{**batch, 'tokens': tokens})

  before = logits_of(batch['tokens'])
  changed = batch['tokens'].copy()
  changed[0, 3:] = (changed[0, 3:] + 7) % 40
  after = logits_of(changed)
  np.testing.assert_array_equal(after[:, 0, :3], before[:, 0, :3])
  np.testing.assert_array_equal(after[:, 1], before[:, 1])
  assert (after[:, 0, 3:] != before[:, 0, 3:]).any(axis=-1).all()

  rotary = model.rotary(batch['positions'])
  attend = models.packed_attend(batch['segment_ids'], batch['positions'], None)

  @jax.jit
  def influence(hidden):
    def second_document(hidden):
      kept = model.hidden_at_exits(params, hidden, rotary=rotary, attend=attend)
      features, _ = model.exit_features(
        params, config.exits[0], kept[0], rotary=rotary, attend=attend
      )
      return jnp.sum(jnp.sin(kept[:, 0, 3:])) + jnp.sum(jnp.sin(features[0, 3:]))

    return jax.grad(second_document)(hidden)

  gradient = influence(model.embed(params, batch['tokens']))
  assert (gradient[0, :3] == 0).all()
  assert (gradient[1] == 0).all()
  assert (gradient[0, 3:] != 0).all()


def test_later_tokens_change_nothing_before_them(random_params, packed_batch):
  model = ExitLM(dataclasses.replace(CONFIG, precision=Precision.FLOAT32))
  params = random_params(model)
  batch = packed_batch((8,), vocab_size=40)
  logits_of = jax.jit(
    lambda tokens: models.logits_at_exits(model, params, **{**batch, 'tokens': tokens})
  )
  changed = batch['tokens'].copy()
  changed[0, 5] = (changed[0, 5] + 1) % 40
  before, after = logits_of(batch['tokens']), logits_of(changed)
  np.testing.assert_array_equal(after[:, :, :5], before[:, :, :5])
  assert (after[:, :, 5:] != before[:, :, 5:]).any(axis=-1).all()


def test_bfloat16_logits_follow_float32(random_params, packed_batch):
  batch = packed_batch((5, 3), vocab_size=40)
  logits = {}
  for precision in (Precision.FLOAT32, Precision.BFLOAT16):
    model = ExitLM(dataclasses.replace(CONFIG, precision=precision))
    params = random_params(model)
    logits[precision] = jax.jit(
      lambda params, model=model: models.logits_at_exits(model, params, **batch),
      compiler_options=QUICK,
    )(params)
    features = jax.eval_shape(
      lambda params, model=model: models.features_at_exits(model, params, **batch), params
    )
    assert {x.dtype for x in features} == {jnp.dtype(precision.value)}
  narrow, wide = logits[Precision.BFLOAT16], logits[Precision.FLOAT32]
  assert narrow.dtype == jnp.float32
  error = np.abs(narrow - wide).max() / np.abs(wide).max()
  assert 1e-5 < error < 0.05


def test_rope_scaling_reaches_the_logits(random_params, packed_batch):
  batch = packed_batch((8,), vocab_size=40)
  plain = dataclasses.replace(CONFIG, precision=Precision.FLOAT32, exits=())
  rope = RopeConfig(scaling=RopeScaling.LINEAR, factor=2.0)
  outputs = [
    models.logits_at_exits(ExitLM(config), random_params(ExitLM(config)), **batch)
    for config in (plain, dataclasses.replace(plain, rope=rope))
  ]
  np.testing.assert_allclose(outputs[0][..., 0, :], outputs[1][..., 0, :], atol=1e-5)
  assert not np.allclose(outputs[0][..., 1:, :], outputs[1][..., 1:, :], atol=1e-2)
