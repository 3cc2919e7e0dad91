"""Muon: kernels move orthogonally, all else as AdamW moves it, on any mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import models, training
from exitax.layers import HeadKind
from exitax.parallel import MeshConfig, ShardingRules, make_mesh, path_name
from exitax.training import OptimizerConfig, learning_rate_schedule, make_optimizer, muon
from tests.training.tiny_run import make_config

CONFIG = OptimizerConfig(
  learning_rate=1.0, warmup_steps=0, decay='constant', weight_decay=0.0, clip_norm=0.0, chain=muon
)


def matrices(name: str, leaf: np.ndarray) -> np.ndarray:
  """A kernel as matrices `[layers, inputs, outputs]`."""
  kind = name.split('/')[-2]
  if kind in ('query', 'key', 'value'):
    return leaf.reshape(-1, leaf.shape[-3], leaf.shape[-2] * leaf.shape[-1])
  if kind == 'output':
    return leaf.reshape(-1, leaf.shape[-3] * leaf.shape[-2], leaf.shape[-1])
  return leaf.reshape(-1, *leaf.shape[-2:])


def test_updates_of_kernels_are_orthogonal_and_of_one_size():
  config = models.ModelConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=24,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=40,
    max_length=8,
    qk_norm=True,
    exits=(models.ExitConfig(layer=1, head=HeadKind.LAYER),),
  )
  params = models.ExitLM(config).init(jax.random.key(0))
  gradients = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(x.size), x.shape, jnp.float32), params
  )
  optimizer = make_optimizer(CONFIG, learning_rate_schedule(CONFIG, train_steps=10))
  updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
  kernels = 0
  for (path, update), gradient in zip(
    jax.tree.leaves_with_path(updates), jax.tree.leaves(gradients), strict=True
  ):
    name = path_name(path)
    if not name.endswith('/kernel'):
      # AdamW's first step, which Nesterov's momentum lengthens.
      np.testing.assert_allclose(update, -jnp.sign(gradient) * jnp.abs(update).max(), rtol=1e-3)
      continue
    for moved, given in zip(
      matrices(name, np.asarray(update)), matrices(name, np.asarray(gradient)), strict=True
    ):
      kernels += 1
      left, _, right = np.linalg.svd(given, full_matrices=False)
      # 0.2 in every entry on average; Newton and Schulz come within a third of one singular value.
      wanted = -0.2 * np.sqrt(max(given.shape)) * left @ right
      assert np.abs(np.linalg.svd(moved, compute_uv=False)).min() > 0.6 * 0.2 * np.sqrt(
        max(given.shape)
      )
      overlap = np.sum(moved * wanted) / np.linalg.norm(moved) / np.linalg.norm(wanted)
      assert overlap > 0.95
      assert 0.8 < np.linalg.norm(moved) / np.linalg.norm(wanted) < 1.2
  assert kernels == (2 + 1) * 7


def test_moments_lie_where_their_parameters_lie():
  model = models.ExitLM(
    models.ModelConfig(
      vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=16, max_length=8
    )
  )
  mesh, rules = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4]), ShardingRules()
  optimizer = make_optimizer(CONFIG, learning_rate_schedule(CONFIG, train_steps=10))
  shardings = training.state_shardings(model, optimizer, mesh, rules)
  own = {path_name(path): x for path, x in jax.tree.leaves_with_path(shardings.params)}
  moments = [
    (path_name(path), x)
    for path, x in jax.tree.leaves_with_path(shardings.opt_state)
    if path_name(path).endswith('mlp/gate/kernel')
  ]
  assert moments
  assert all(x == own['blocks/mlp/gate/kernel'] for _, x in moments)
  assert own['blocks/mlp/gate/kernel'].spec != jax.sharding.PartitionSpec()


@pytest.mark.slow
def test_a_run_resumes_bitwise(tmp_path):
  config = make_config(tmp_path, train_steps=6, checkpoint_period=3)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, chain=muon))
  whole = training.train(config, tmp_path / 'whole')
  with pytest.raises(KeyboardInterrupt):
    training.train(config, tmp_path / 'halves', display=_Crashing())
  resumed = training.train(config, tmp_path / 'halves')
  jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


class _Crashing(training.QuietDisplay):
  """Ends the run behind its first checkpoint, without another."""

  def advance(self, step: int) -> None:
    if step == 5:
      raise KeyboardInterrupt
