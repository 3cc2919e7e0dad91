from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from exitax import models, training
from exitax.errors import UserError
from exitax.parallel import path_name
from exitax.training import OptimizerConfig, learning_rate_schedule
from exitax.training.optimizer import decay_mask


def _rates(config: OptimizerConfig, steps, *, train_steps: int = 110):
  schedule = learning_rate_schedule(config, train_steps=train_steps)
  return [float(schedule(step)) for step in steps]


PEAK = {'learning_rate': 1.0, 'final_learning_rate': 0.2, 'warmup_steps': 10}


@pytest.mark.parametrize(
  ('decay', 'quarter', 'half', 'end'),
  [
    ('cosine', 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.6, 0.2),
    ('linear', 0.8, 0.6, 0.2),
    ('constant', 1.0, 1.0, 1.0),
  ],
)
def test_rate_rises_then_decays(decay, quarter, half, end):
  config = OptimizerConfig(**PEAK, decay=decay)
  got = _rates(config, (0, 5, 10, 35, 60, 110, 1000))
  np.testing.assert_allclose(got, [0.0, 0.5, 1.0, quarter, half, end, end], rtol=1e-6)


def test_without_warmup_the_first_step_has_the_peak():
  assert _rates(OptimizerConfig(learning_rate=0.5, warmup_steps=0), [0]) == [0.5]


def test_a_run_shorter_than_its_warmup_only_warms_up():
  got = _rates(OptimizerConfig(**PEAK), (0, 2, 4), train_steps=4)
  np.testing.assert_allclose(got, [0.0, 0.5, 1.0])


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'learning_rate': 0.0}, r'^learning_rate=0.0 must be positive'),
    ({'warmup_steps': -1}, r'^warmup_steps=-1 is negative'),
    ({'clip_norm': -1.0}, r'^clip_norm=-1.0 is negative'),
    ({'decay': 'step'}, r"^OptimizerConfig.decay='step' is not known: choose 'cosine'"),
  ],
)
def test_bad_values_are_named(values, message):
  with pytest.raises(UserError, match=message):
    OptimizerConfig(**values)


def test_decay_spares_scales_and_biases_alone():
  config = models.ModelConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    mlp_dim=8,
    max_length=8,
    qk_norm=True,
    qkv_bias=True,
    tie_embeddings=False,
    exits=(models.ExitConfig(layer=1, head='layer', matrix='own'),),
  )
  shapes = jax.eval_shape(models.ExitLM(config).init, jax.random.key(0))
  by_name = {
    path_name(path): decayed for path, decayed in jax.tree.leaves_with_path(decay_mask(shapes))
  }
  spared = {name for name, decayed in by_name.items() if not decayed}
  assert spared == {name for name in by_name if 'norm' in name or name.endswith('bias')}
  assert {'embed/matrix', 'head/matrix', 'exits/1/matrix'} <= by_name.keys() - spared


def _update(config: OptimizerConfig, params, gradients):
  optimizer = training.make_optimizer(config, optax.constant_schedule(config.learning_rate))
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  return updates


def test_first_step_is_that_of_adamw():
  """Adam's first step is the gradient's sign; decay is decoupled, rate times weight."""
  params = {'kernel': jnp.asarray([2.0, -4.0]), 'bias': jnp.asarray([5.0])}
  gradients = {'kernel': jnp.asarray([0.3, -0.1]), 'bias': jnp.asarray([0.2])}
  config = OptimizerConfig(learning_rate=0.01, weight_decay=0.5, clip_norm=0.0)
  updates = _update(config, params, gradients)
  np.testing.assert_allclose(
    updates['kernel'], [-0.01 - 0.01 * 0.5 * 2, 0.01 + 0.01 * 0.5 * 4], rtol=1e-5
  )
  np.testing.assert_allclose(updates['bias'], [-0.01], rtol=1e-5)


def test_clipping_bounds_the_global_norm():
  params = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
  gradients = {'a': jnp.asarray([3.0, 0.0]), 'b': jnp.asarray([4.0])}

  def sgd_after_clipping(config, schedule):
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.sgd(schedule))

  # The chain is the user's to choose.
  config = OptimizerConfig(learning_rate=1.0, clip_norm=1.0, chain=sgd_after_clipping)
  updates = _update(config, params, gradients)
  np.testing.assert_allclose(updates['a'], [-0.6, 0.0], rtol=1e-6)
  np.testing.assert_allclose(updates['b'], [-0.8], rtol=1e-6)
  # The default chain clips before AdamW: with a large epsilon Adam is linear in the gradient.
  default = {'learning_rate': 1.0, 'weight_decay': 0.0, 'epsilon': 1e6}
  clipped = _update(OptimizerConfig(**default, clip_norm=1.0), params, gradients)
  free = _update(OptimizerConfig(**default, clip_norm=0.0), params, gradients)
  np.testing.assert_allclose(5 * clipped['a'], free['a'], rtol=1e-4)
