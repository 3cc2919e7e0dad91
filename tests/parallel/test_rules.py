"""Rules: names to mesh axes, collisions, divisibility."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec as P

from exitax import parallel
from exitax.errors import UserError

RULES = parallel.ShardingRules()


@pytest.mark.parametrize(
  ('axes', 'spec'),
  [
    (('vocab', 'embed'), P('tensor', 'data')),
    (('layers', 'embed', 'heads', 'kv'), P('pipeline', 'data', 'tensor', None)),
    (('batch', 'activation_length', 'activation_embed'), P('data', 'tensor', None)),
    (('batch', 'length', 'mlp'), P('data', None, 'tensor')),
    (('stage', None), P('pipeline', None)),
    ((), P()),
  ],
)
def test_standard_rules(axes, spec):
  assert parallel.logical_to_spec(axes, RULES) == spec


def test_options_switch_fsdp_and_sequence_parallelism_off():
  rules = parallel.ShardingRules(parameters='replicated', sequence='whole')
  assert parallel.logical_to_spec(('vocab', 'embed'), rules) == P('tensor', None)
  assert parallel.logical_to_spec(('batch', 'activation_length'), rules) == P('data', None)


def test_overrides_replace_and_extend():
  rules = parallel.ShardingRules(overrides=(('vocab', ('pipeline', 'tensor')), ('rank', None)))
  assert parallel.logical_to_spec(('vocab', 'rank'), rules) == P(('pipeline', 'tensor'), None)


def test_equal_rules_are_one_cache_key():
  by_name = parallel.ShardingRules(parameters='fsdp', overrides=(('mlp', 'data'),))
  by_member = parallel.ShardingRules(overrides=(('mlp', ('data',)),))
  assert by_name == by_member
  assert hash(by_name) == hash(by_member)


def test_collision_names_both_dimensions():
  with pytest.raises(UserError) as error:
    parallel.logical_to_spec(('embed', 'heads', 'mlp'), RULES)
  assert str(error.value) == (
    "logical axes [embed, heads, mlp]: dimension 1 ('heads') and dimension 2 ('mlp') both map to "
    "mesh axis 'tensor': override the rule of one of them"
  )


def test_collision_within_a_tuple_of_mesh_axes():
  rules = parallel.ShardingRules(overrides=(('batch', ('data', 'tensor')),))
  with pytest.raises(UserError, match=r"dimension 0 \('batch'\) and dimension 2 \('mlp'\)"):
    parallel.logical_to_spec(('batch', 'length', 'mlp'), rules)


def test_unknown_names_list_the_known():
  with pytest.raises(UserError, match=r"'head' is in no sharding rule: known are activation_embed"):
    parallel.logical_to_spec(('embed', 'head'), RULES)
  with pytest.raises(UserError, match=r"rule 'mlp' names mesh axis 'model': choose data, pipeline"):
    parallel.ShardingRules(overrides=(('mlp', 'model'),))
  with pytest.raises(UserError, match=r"'zero' is not known: choose 'fsdp', 'replicated'"):
    parallel.ShardingRules(parameters='zero')


def test_indivisible_dimension_names_size_and_choices():
  mesh = parallel.make_mesh(parallel.MeshConfig(tensor=3), jax.devices()[:3])
  with pytest.raises(UserError) as error:
    parallel.check_divisible((16, 8, 4), ('embed', 'heads', 'kv'), mesh, RULES, 'query')
  assert str(error.value) == 'query: tensor=3 does not divide num_heads=8: choose 1, 2, 4 or 8'


def test_indivisible_over_two_mesh_axes():
  mesh = parallel.make_mesh(parallel.MeshConfig(2, 1, 4))
  rules = parallel.ShardingRules(overrides=(('mlp', ('data', 'tensor')),))
  with pytest.raises(UserError, match=r'^up: data=2 x tensor=4 does not divide mlp_dim=12: choose'):
    parallel.check_divisible((12,), ('mlp',), mesh, rules, 'up')


def test_few_key_value_heads_are_replicated():
  mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 8))
  shape, axes = (16, 2, 4), ('embed', 'kv_heads', 'kv')
  parallel.check_divisible(shape, axes, mesh, RULES, 'key')
  tree = parallel.tree_shardings(jax.ShapeDtypeStruct(shape, 'float32'), axes, mesh, RULES)
  assert tree.spec == P('data', None, None)


def test_rank_must_match():
  mesh = parallel.make_mesh(parallel.MeshConfig())
  with pytest.raises(ValueError, match=r'query: shape \(16, 8\) needs 2 axes, got \[embed\]'):
    parallel.check_divisible((16, 8), ('embed',), mesh, RULES, 'query')
