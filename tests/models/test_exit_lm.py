from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers, models
from exitax.layers import HeadKind, Precision
from exitax.models import ExitConfig, ExitLM, ExitMatrix, ModelConfig, Remat, exit_lm

BASE = ModelConfig(
  vocab_size=40,
  num_layers=4,
  embed_dim=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=20,
  max_length=16,
  qk_norm=True,
  qkv_bias=True,
  tie_embeddings=False,
)
EXITS = (
  ExitConfig(layer=1, head=HeadKind.EMBEDDING, matrix=ExitMatrix.INPUT),
  ExitConfig(layer=2, head=HeadKind.MLP, matrix=ExitMatrix.OWN),
  ExitConfig(layer=3, head=HeadKind.LAYER, matrix=ExitMatrix.SHARED),
)
FULL = dataclasses.replace(BASE, exits=EXITS)


def _init(config: ModelConfig, seed: int = 0):
  # This program runs once: little is gained by compiling it well.
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(ExitLM(config).init, compiler_options=options)(jax.random.key(seed))


@pytest.mark.parametrize('tie_embeddings', [True, False])
def test_logical_axes_name_every_dimension_of_every_leaf(tie_embeddings):
  model = ExitLM(dataclasses.replace(FULL, tie_embeddings=tie_embeddings, output_bias=True))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  axes = model.logical_axes()
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_axes)
  sizes: dict[str, set[int]] = {}
  for leaf, names in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_axes), strict=True
  ):
    assert leaf.dtype == jnp.float32
    for name, size in zip(names, leaf.shape, strict=True):
      sizes.setdefault(name, set()).add(size)
  # One name, one size: a name on the wrong dimension would show.
  assert sizes == {
    'vocab': {40},
    'embed': {12},
    'layers': {4},
    'heads': {4},
    'kv_heads': {2},
    'kv': {6},
    'mlp': {20},
    'norm': {12},
  }
  assert ('head' in shapes) != tie_embeddings


def test_tree_is_the_documented_one():
  shapes = jax.eval_shape(ExitLM(FULL).init, jax.random.key(0))
  assert set(shapes) == {'embed', 'blocks', 'norm', 'head', 'shared_exit', 'exits'}
  assert set(shapes['exits']) == {'2', '3'}
  assert set(shapes['exits']['2']) == {'head', 'matrix'}
  assert set(shapes['exits']['3']) == {'head'}
  assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes['blocks'])} == {4}
  lightest = dataclasses.replace(BASE, exits=EXITS[:1])
  assert 'exits' not in jax.eval_shape(ExitLM(lightest).init, jax.random.key(0))


def test_adding_an_exit_leaves_the_rest_bitwise_as_it_was():
  plain, full = _init(BASE), _init(FULL)
  fewer = _init(dataclasses.replace(FULL, exits=EXITS[1:2]))
  for name in ('embed', 'blocks', 'norm', 'head'):
    jax.tree.map(np.testing.assert_array_equal, plain[name], full[name])
  jax.tree.map(np.testing.assert_array_equal, fewer['exits']['2'], full['exits']['2'])


def test_initial_parameters_have_the_described_spread():
  params = _init(FULL)
  leaves = jax.tree.leaves_with_path(params)
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name.endswith('scale'):
      assert (leaf == 1).all(), name
    elif name.endswith('bias'):
      assert (leaf == 0).all(), name
    else:
      wanted = 0.02 / 8**0.5 if '/output/' in name or '/down/' in name else 0.02
      assert 0.8 * wanted < float(jnp.std(leaf)) < 1.2 * wanted, name
  # No two layers, and no two matrices, begin alike.
  query = params['blocks']['attention']['query']['kernel']
  assert not np.array_equal(query[0], query[1])
  assert not np.array_equal(params['embed']['matrix'], params['head']['matrix'])
  assert not np.array_equal(params['shared_exit']['matrix'], params['exits']['2']['matrix'])


def test_another_key_gives_other_parameters():
  first, second = _init(BASE), _init(BASE, seed=1)
  assert not np.array_equal(first['embed']['matrix'], second['embed']['matrix'])
  assert not np.array_equal(*(p['blocks']['mlp']['up']['kernel'] for p in (first, second)))


def _context(model, batch):
  rotary = model.rotary(batch['positions'])
  return rotary, models.packed_attend(batch['segment_ids'], batch['positions'], None)


@pytest.mark.parametrize('spans', [(4,), (1, 3), (2, 1, 1)])
def test_spans_of_unstacked_layers_are_the_scan(random_params, packed_batch, spans):
  model = ExitLM(FULL)
  params = random_params(model)
  batch = packed_batch((5, 3), (8,), vocab_size=40)

  @jax.jit
  def both(params):
    rotary, attend = _context(model, batch)
    hidden = model.embed(params, batch['tokens'])
    kept = model.hidden_at_exits(params, hidden, rotary=rotary, attend=attend)
    unstacked = model.unstack(params)
    after, states, first = {}, [], 0
    for size in spans:
      hidden, span_states = model.run_layers(
        unstacked,
        hidden,
        layers=range(first, first + size),
        rotary=rotary,
        attend=[lambda q, k, v, n=n: (attend(q, k, v)[0], n) for n in range(first, first + size)],
      )
      first += size
      after[first] = hidden
      states += span_states
    return kept, after, states

  kept, after, states = both(params)
  assert [int(state) for state in states] == [0, 1, 2, 3]
  rows = {1: 0, 2: 1, 3: 2, 4: 3}
  for layer, hidden in after.items():
    np.testing.assert_allclose(hidden, kept[rows[layer]], rtol=1e-4, atol=1e-4)


def test_only_the_span_is_read(random_params, packed_batch):
  """A server of layers 1 and 2 holds no other block."""
  model = ExitLM(BASE)
  unstacked = model.unstack(random_params(model))
  batch = packed_batch((6,), vocab_size=40)
  rotary, attend = _context(model, batch)
  hidden = jnp.ones((1, 6, 12))
  arguments = {'layers': range(1, 3), 'rotary': rotary, 'attend': [attend, attend]}
  whole, _ = model.run_layers(unstacked, hidden, **arguments)
  blocks = (None, *unstacked['blocks'][1:3])
  part, _ = model.run_layers({'blocks': blocks}, hidden, **arguments)
  np.testing.assert_array_equal(part, whole)


def test_unstacking_twice_is_unstacking_once(random_params):
  model = ExitLM(BASE)
  params = random_params(model)
  once = model.unstack(params)
  assert len(once['blocks']) == 4
  assert model.unstack(once) is once
  np.testing.assert_array_equal(
    once['blocks'][2]['mlp']['up']['kernel'], params['blocks']['mlp']['up']['kernel'][2]
  )


def test_vocabulary_matrices_are_the_configured_ones(random_params):
  model = ExitLM(FULL)
  params = random_params(model)
  assert model.vocab_matrix(params, EXITS[0]) is params['embed']['matrix']
  assert model.vocab_matrix(params, EXITS[1]) is params['exits']['2']['matrix']
  assert model.vocab_matrix(params, EXITS[2]) is params['shared_exit']['matrix']
  assert model.vocab_matrix(params, None) is params['head']['matrix']
  final = ExitConfig(layer=1)
  assert model.vocab_matrix(params, final) is params['head']['matrix']
  tied = ExitLM(dataclasses.replace(FULL, tie_embeddings=True))
  tied_params = random_params(tied)
  for exit_config in (None, final, EXITS[0]):
    assert tied.vocab_matrix(tied_params, exit_config) is tied_params['embed']['matrix']


def test_rematerialisation_changes_no_gradient(x64, random_params, packed_batch, monkeypatch):
  batch = packed_batch((3, 2), vocab_size=40)
  config = dataclasses.replace(
    FULL, num_layers=2, exits=EXITS[:1], precision=Precision.FLOAT64, embed_dim=8
  )
  params = random_params(ExitLM(config))

  def loss(params, remat: Remat):
    model = ExitLM(dataclasses.replace(config, remat=remat))
    return jnp.mean(jnp.tanh(models.logits_at_exits(model, params, **batch)) ** 2)

  gradient = jax.jit(
    jax.value_and_grad(loss),
    static_argnums=1,
    compiler_options={'xla_backend_optimization_level': 0},
  )
  plain_loss, plain = gradient(params, Remat.NONE)
  products = {}
  # As on other platforms: one scan with and without rematerialisation, so that counts compare.
  monkeypatch.setattr(layers.platform, 'on_cpu', lambda: False)
  for remat in Remat:
    value, got = gradient(params, remat)
    np.testing.assert_allclose(value, plain_loss, rtol=1e-12)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-14), got, plain)
    program = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, remat)
    products[remat] = str(program).count('dot_general')
  # FULL runs weight products again, DOTS those of attention only.
  assert products[Remat.NONE] < products[Remat.DOTS] < products[Remat.FULL]


def test_unrolled_layers_equal_scanned_ones(x64, random_params, packed_batch, monkeypatch):
  batch = packed_batch((3, 2), vocab_size=40)
  model = ExitLM(dataclasses.replace(FULL, precision=Precision.FLOAT64))
  params = random_params(model)

  def results():
    # A new function each time: the platform is asked while tracing.
    def loss(params):
      return jnp.mean(jnp.tanh(models.logits_at_exits(model, params, **batch)) ** 2)

    program = str(jax.make_jaxpr(loss)(params))
    return 'scan' in program, jax.jit(jax.value_and_grad(loss))(params)

  scans, unrolled = results()
  assert not scans
  monkeypatch.setattr(exit_lm, 'MAX_UNROLLED', model.config.num_layers - 1)
  scans, scanned = results()
  assert scans
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14), unrolled, scanned
  )


def test_boxes_do_not_leak():
  params = jax.eval_shape(ExitLM(FULL).init, jax.random.key(0))
  boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
  assert not any(isinstance(x, nn.meta.AxisMetadata) for x in boxes)
