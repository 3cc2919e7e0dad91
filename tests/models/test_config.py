from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitax import models
from exitax.errors import UserError
from exitax.layers import HeadKind, Precision, RopeConfig, RopeScaling
from exitax.models import ExitConfig, ExitMatrix, ModelConfig, Remat

SIZES = {
  'vocab_size': 64,
  'num_layers': 4,
  'embed_dim': 16,
  'num_heads': 4,
  'mlp_dim': 32,
  'max_length': 32,
}


def _exits(*places: int) -> tuple[ExitConfig, ...]:
  return tuple(ExitConfig(layer=layer) for layer in places)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    *(({name: 0}, f'^{name}=0 must be at least 1$') for name in SIZES),
    (
      {'num_heads': 3},
      '^num_heads=3 does not divide embed_dim=16: choose a divisor or set head_dim$',
    ),
    ({'num_kv_heads': 3}, '^num_kv_heads=3 does not divide num_heads=4: choose 1, 2, 4$'),
    ({'num_kv_heads': 8}, '^num_kv_heads=8 does not divide num_heads=4: choose 1, 2, 4$'),
    ({'num_kv_heads': -1}, '^num_kv_heads=-1 '),
    ({'head_dim': 3}, '^head_dim=3 must be even'),
    ({'head_dim': -2}, '^head_dim=-2 must be even and positive'),
    ({'sliding_window': 0}, '^sliding_window=0 must be at least 1, or None$'),
    ({'norm_epsilon': -1.0}, '^norm_epsilon=-1.0 '),
    ({'init_std': float('nan')}, 'init_std=nan must be 0 or more$'),
    ({'exits': _exits(0)}, '^exit layer 0 is out of range: a model of 4 layers .* 1 to 3$'),
    ({'exits': _exits(1, 4)}, '^exit layer 4 is out of range'),
    ({'exits': _exits(-1)}, '^exit layer -1 is out of range'),
    ({'exits': _exits(1), 'num_layers': 1}, '^exit layer 1 is out of range: a model of 1 layer'),
    ({'exits': _exits(2, 2)}, '^exit layer 2 is repeated: give each exit a layer of its own$'),
    ({'exits': _exits(3, 1)}, r'^exit layers \[3, 1\] are out of order: list them as \[1, 3\]$'),
    ({'precision': 'fp8'}, "^precision='fp8' is not known: choose 'float32', 'bfloat16'"),
    ({'remat': 'all'}, "^remat='all' is not known: choose 'none', 'dots', 'full'$"),
  ],
)
def test_bad_values_are_named_with_their_limit(changes, message):
  with pytest.raises(UserError, match=message):
    ModelConfig(**{**SIZES, **changes})


def test_bad_exit_values_are_named():
  with pytest.raises(UserError, match=r"^ExitConfig.head='big' is not known: choose 'embedding', "):
    ExitConfig(layer=1, head='big')
  with pytest.raises(UserError, match=r"^ExitConfig.matrix='mine' is not known: choose 'input', "):
    ExitConfig(layer=1, matrix='mine')


def test_strings_name_enum_members():
  config = ModelConfig(
    **SIZES,
    precision='bfloat16',
    remat='dots',
    exits=[ExitConfig(layer=2, head='layer', matrix='shared')],
  )
  assert (config.precision, config.remat) == (Precision.BFLOAT16, Remat.DOTS)
  assert config.exits == (ExitConfig(layer=2, head=HeadKind.LAYER, matrix=ExitMatrix.SHARED),)
  hash(config)


def test_sizes_left_out_follow_the_heads():
  config = ModelConfig(**SIZES)
  assert (config.num_kv_heads, config.head_dim) == (4, 4)
  config = ModelConfig(**SIZES, num_kv_heads=2, head_dim=10)
  assert (config.block.num_kv_heads, config.block.head_dim) == (2, 10)


def test_depths_are_the_exits_and_the_end():
  config = ModelConfig(**SIZES, exits=_exits(1, 3))
  assert config.depths == (1, 3, 4)
  assert config.depth_names == ('exit_1', 'exit_3', 'final')


def test_what_a_block_needs_reaches_it():
  rope = RopeConfig(theta=7.0)
  config = ModelConfig(
    **SIZES,
    rope=rope,
    norm_epsilon=0.5,
    qk_norm=True,
    qkv_bias=True,
    output_bias=True,
    sliding_window=5,
    init_std=0.4,
    precision=Precision.BFLOAT16,
  )
  block = config.block
  for name in ('embed_dim', 'num_heads', 'mlp_dim', 'norm_epsilon', 'qk_norm', 'qkv_bias'):
    assert getattr(block, name) == getattr(config, name)
  for name in ('output_bias', 'sliding_window', 'init_std', 'precision', 'rope'):
    assert getattr(block, name) == getattr(config, name)
  assert block.residual_init_std == pytest.approx(0.4 / 8**0.5)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
  num_layers = draw(st.integers(1, 12))
  places = draw(st.sets(st.integers(1, max(num_layers - 1, 1)), max_size=4))
  exits = tuple(
    ExitConfig(
      layer=layer, head=draw(st.sampled_from(HeadKind)), matrix=draw(st.sampled_from(ExitMatrix))
    )
    for layer in sorted(places)
    if layer < num_layers
  )
  num_kv_heads = draw(st.integers(1, 4))
  return ModelConfig(
    vocab_size=draw(st.integers(1, 10**6)),
    num_layers=num_layers,
    embed_dim=draw(st.integers(1, 4096)),
    num_heads=num_kv_heads * draw(st.integers(1, 4)),
    num_kv_heads=num_kv_heads,
    head_dim=2 * draw(st.integers(1, 64)),
    mlp_dim=draw(st.integers(1, 4096)),
    max_length=draw(st.integers(1, 10**6)),
    rope=RopeConfig(
      theta=draw(st.floats(1.5, 1e7)),
      scaling=draw(st.sampled_from(RopeScaling)),
      factor=draw(st.floats(1.0, 64.0)),
      original_length=draw(st.integers(1, 10**6)),
    ),
    norm_epsilon=draw(st.floats(0.0, 1.0)),
    qk_norm=draw(st.booleans()),
    qkv_bias=draw(st.booleans()),
    output_bias=draw(st.booleans()),
    sliding_window=draw(st.none() | st.integers(1, 10**5)),
    tie_embeddings=draw(st.booleans()),
    exits=exits,
    init_std=draw(st.floats(0.0, 1.0)),
    precision=draw(st.sampled_from(Precision)),
    remat=draw(st.sampled_from(Remat)),
  )


@settings(deadline=None)
@given(configs())
def test_json_gives_the_same_configuration_back(config):
  text = json.dumps(config.to_dict(), allow_nan=False)
  again = models.ModelConfig.from_dict(json.loads(text))
  assert again == config
  assert again.to_dict() == json.loads(text)


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda values: values.pop('rope'), 'rope'),
    (lambda values: values.pop('num_layers'), 'num_layers'),
    (lambda values: values.update(num_experts=8), 'num_experts'),
    (lambda values: values['rope'].update(base=1), 'base'),
    (lambda values: values['exits'][0].update(layer='2'), 'does not fit this version'),
    (lambda values: values['exits'][0].update(layer=9), 'exit layer 9 is out of range'),
    (lambda values: values.update(remat='some'), "remat='some'"),
    (lambda values: values.update(exits=3), 'does not fit this version'),
  ],
)
def test_damaged_values_are_user_errors(spoil, message):
  values = ModelConfig(**SIZES, exits=_exits(2)).to_dict()
  spoil(values)
  with pytest.raises(UserError, match=message):
    ModelConfig.from_dict(values)


def test_reading_leaves_its_argument_alone():
  values = ModelConfig(**SIZES, exits=_exits(2)).to_dict()
  before = json.dumps(values)
  ModelConfig.from_dict(values)
  assert json.dumps(values) == before
