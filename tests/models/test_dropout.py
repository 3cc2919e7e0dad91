"""Rates of layers and steps, and what a model drops."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import models
from exitax.errors import UserError
from exitax.layers import DropSite, platform
from exitax.models import DropoutConfig, ExitConfig, ExitLM, Remat

QUICK = {'xla_backend_optimization_level': 0}
LENGTH, ROWS = 6, 4
CONFIG = models.ModelConfig(
  vocab_size=16,
  num_layers=3,
  embed_dim=8,
  num_heads=2,
  mlp_dim=8,
  max_length=LENGTH,
  exits=(ExitConfig(layer=1),),
)
DROPPED = DropoutConfig(residual_rate=0.3, embedding_rate=0.2, layer_rate=0.7, seed=2)


# Rates.


@pytest.mark.parametrize('num_layers', [2, 5, 32])
def test_rates_grow_exponentially_over_layers(num_layers):
  rates = DropoutConfig(layer_rate=0.2).layer_rates(7, num_layers)
  wanted = [
    0.2 * (math.exp(layer * math.log(2) / (num_layers - 1)) - 1) for layer in range(num_layers)
  ]
  np.testing.assert_allclose(rates, wanted, rtol=1e-6)
  assert rates[0] == 0
  assert rates[-1] == np.float32(0.2)


@pytest.mark.parametrize('step', [0, 1, 50, 99, 100, 1000])
def test_the_curriculum_grows_exponentially_over_steps(step):
  steps = 100
  config = DropoutConfig(layer_rate=0.5, curriculum_steps=steps)
  rates = jax.jit(lambda step: config.layer_rates(step, 4))(step)
  time = min(math.exp(step * math.log(2) / (steps - 1)) - 1, 1.0)
  wanted = [0.5 * time * (2 ** (layer / 3) - 1) for layer in range(4)]
  np.testing.assert_allclose(rates, wanted, rtol=1e-6)
  if step == 0:
    assert not np.any(rates)
  if step >= steps - 1:
    assert rates[-1] == pytest.approx(0.5, rel=1e-6)


def test_a_model_of_one_layer_always_runs_it():
  assert DropoutConfig(layer_rate=0.5).layer_rates(0, 1).tolist() == [0.0]


def test_rows_are_dropped_at_the_rate_of_their_layer():
  config = DropoutConfig(layer_rate=0.6)
  dropout = config.at(0, num_layers=4, num_rows=4000)
  before, after = jnp.zeros((4000, 1, 1)), jnp.ones((4000, 1, 1))
  for layer, rate in enumerate(np.asarray(config.layer_rates(0, 4), float)):
    kept = np.asarray(dropout.drop_layer(layer, before, after)).mean()
    assert abs(1 - kept - rate) <= 3 * (rate * (1 - rate) / 4000) ** 0.5


# Masks.


def _masks(config: DropoutConfig, step: int, layer: int) -> list[np.ndarray]:
  """Of each site, what is zero when everything is one."""
  dropout = config.at(step, num_layers=3, num_rows=64)
  ones = jnp.ones((64, 4, 4))
  results = [
    dropout.drop_embedding(ones),
    dropout.in_layer(layer)(ones, DropSite.ATTENTION),
    dropout.in_layer(layer)(ones, DropSite.MLP),
    dropout.drop_layer(layer, jnp.zeros_like(ones), ones),
  ]
  return [np.asarray(x) == 0 for x in results]


def test_sites_layers_steps_and_seeds_have_masks_of_their_own():
  config = DropoutConfig(residual_rate=0.5, embedding_rate=0.5, layer_rate=0.9, seed=1)
  base = _masks(config, step=5, layer=2)
  for again, mask in zip(_masks(config, step=5, layer=2), base, strict=True):
    np.testing.assert_array_equal(again, mask)
  others = [
    *_masks(config, step=6, layer=2),
    *_masks(dataclasses.replace(config, seed=2), step=5, layer=2),
    *_masks(config, step=5, layer=1)[1:],
  ]
  every = [*base, *others]
  assert len({mask.tobytes() for mask in every}) == len(every)


def test_a_dropped_layer_drops_whole_rows():
  *_, mask = _masks(DROPPED, step=0, layer=2)
  by_row = mask.reshape(64, -1)
  assert 0 < by_row.all(1).sum() < 64
  np.testing.assert_array_equal(by_row.all(1), by_row.any(1))


def test_rows_may_be_cut_in_any_order():
  dropout = DROPPED.at(0, num_layers=3, num_rows=8)
  x = jnp.ones((8, LENGTH, 4))
  whole = dropout.in_layer(1)(x, DropSite.MLP)
  rows = jnp.asarray([5, 2, 7])
  part = models.with_rows(dropout, rows).in_layer(1)(x[:3], DropSite.MLP)
  np.testing.assert_array_equal(part, whole[rows])
  assert models.with_rows(None, None) is None


def test_no_rate_is_no_dropout():
  idle = DropoutConfig(curriculum_steps=10, seed=4)
  assert idle.at(3, num_layers=3, num_rows=2) is None
  for name in ('residual_rate', 'embedding_rate', 'layer_rate'):
    one = dataclasses.replace(idle, **{name: 0.1})
    assert one.at(3, num_layers=3, num_rows=2) is not None


# The model.


def _batch() -> dict[str, np.ndarray]:
  tokens = np.random.default_rng(0).integers(0, 16, (ROWS, LENGTH)).astype(np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  return {'tokens': tokens, 'segment_ids': np.ones_like(tokens), 'positions': positions}


def _features(params, config: models.ModelConfig, dropout):
  return models.features_at_exits(ExitLM(config), params, **_batch(), dropout=dropout)


def _loss_and_gradients(config: models.ModelConfig, dropout_config: DropoutConfig):
  params = ExitLM(config).init(jax.random.key(0))

  def loss(params):
    dropout = dropout_config.at(0, num_layers=3, num_rows=ROWS)
    return sum(jnp.sum(x[..., 0] + x[..., 1] ** 2) for x in _features(params, config, dropout))

  return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


def _assert_close(got, wanted, tolerance: float) -> None:
  for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * np.abs(right).max())


def test_recomputed_and_scanned_layers_drop_the_same(monkeypatch):
  wanted = _loss_and_gradients(CONFIG, DROPPED)
  whole, _ = _loss_and_gradients(CONFIG, DropoutConfig())
  assert abs(wanted[0] - whole) > 1e-2 * abs(whole)
  recomputed = dataclasses.replace(CONFIG, remat=Remat.FULL)
  _assert_close(_loss_and_gradients(recomputed, DROPPED), wanted, 1e-5)
  monkeypatch.setattr(platform, 'on_cpu', lambda: False)
  _assert_close(_loss_and_gradients(CONFIG, DROPPED), wanted, 1e-5)


def test_a_dropped_layer_passes_the_stream_on_and_learns_nothing():
  """A seed with which every row drops the last layer: the exit before it reads the same stream."""
  config = dataclasses.replace(CONFIG, exits=(ExitConfig(layer=2, head='norm'),))
  params = jax.tree.map(lambda x: 5 * x, ExitLM(config).init(jax.random.key(0)))
  for seed in range(100):
    dropout_config = DropoutConfig(layer_rate=0.8, seed=seed)
    dropout = dropout_config.at(0, num_layers=3, num_rows=ROWS)
    one = jnp.ones((ROWS, 1, 1))
    if not np.any(dropout.drop_layer(2, jnp.zeros_like(one), one)):
      break
  else:
    pytest.fail('no seed drops the layer in every row')
  params['exits']['2']['head']['norm'] = params['norm']
  shallow, final = _features(params, config, dropout)
  np.testing.assert_array_equal(shallow, final)

  def loss(blocks):
    return jnp.sum(_features({**params, 'blocks': blocks}, config, dropout)[-1] ** 3)

  for path, gradient in jax.tree.leaves_with_path(jax.grad(loss)(params['blocks'])):
    assert not np.any(gradient[2]), path
    assert np.any(gradient[0]), path


@pytest.mark.parametrize('head', ['mlp', 'layer'])
def test_heads_read_what_was_dropped_and_drop_nothing(head):
  config = dataclasses.replace(CONFIG, exits=(ExitConfig(layer=2, head=head),))
  model, dropout = ExitLM(config), DROPPED.at(0, num_layers=3, num_rows=ROWS)
  params = model.init(jax.random.key(0))
  batch = _batch()
  rotary = model.rotary(batch['positions'])
  attend = models.packed_attend(batch['segment_ids'], batch['positions'], None)
  hidden = dropout.drop_embedding(model.embed(params, batch['tokens']))
  kept = model.hidden_at_exits(params, hidden, rotary=rotary, attend=attend, dropout=dropout)
  wanted, _ = model.exit_features(params, config.exits[0], kept[0], rotary=rotary, attend=attend)
  got = _features(params, config, dropout)[0]
  np.testing.assert_allclose(got, wanted, atol=1e-5)
  assert np.abs(got - _features(params, config, None)[0]).max() > 0.1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'residual_rate': 1.0}, r'^DropoutConfig\.residual_rate=1\.0 is no rate .* below 1$'),
    ({'embedding_rate': -0.1}, r'embedding_rate=-0\.1 is no rate'),
    ({'layer_rate': 1.5}, r'layer_rate=1\.5 is no rate'),
    ({'layer_rate': math.nan}, r'layer_rate=nan is no rate'),
    ({'curriculum_steps': 1}, r'curriculum_steps=1 is no curriculum: choose 2 or more, or 0'),
    ({'curriculum_steps': -5}, r'curriculum_steps=-5 is no curriculum'),
    ({'seed': -1}, r'seed=-1 is negative: choose 0 or more'),
  ],
)
def test_bad_input_is_named(changes, message):
  with pytest.raises(UserError, match=message):
    DropoutConfig(**changes)
