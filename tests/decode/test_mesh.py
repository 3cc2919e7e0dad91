import jax
import numpy as np
import pytest

from exitax import decode, parallel
from exitax.layers import HeadKind

POLICIES = {
  'full': decode.FullDepth(),
  'deferred': decode.DeferredExit(threshold=(0.55, 0.5), pending_capacity=4),
  'recompute': decode.RecomputeExit(threshold=(0.55, 0.5), pending_capacity=2),
  'copy_state': decode.CopyStateExit(threshold=(0.55, 0.5)),
  'speculative': decode.Speculative(max_drafts=3),
}
# Every strategy on one mesh, the one with most waiting tokens on another as well.
PLACES = [*((name, 2) for name in POLICIES), ('deferred', 4)]


@pytest.mark.parametrize(
  ('name', 'tensor'), PLACES, ids=[f'{name}_data{8 // t}_tensor{t}' for name, t in PLACES]
)
def test_decoding_on_a_mesh_equals_one_device(tiny, prompts, name, tensor):
  """Rows over data, heads over tensor, parameters sharded as in training (FSDP and tensor)."""
  model, params = tiny(HeadKind.LAYER)
  settings = {'max_new_tokens': 24, 'policy': POLICIES[name]}
  alone = decode.generate(model, params, prompts, **settings)
  mesh = parallel.make_mesh(parallel.MeshConfig(tensor=tensor))
  rules = parallel.ShardingRules()
  shapes = jax.eval_shape(lambda: params)
  shardings = parallel.tree_shardings(shapes, model.logical_axes(), mesh, rules)
  with parallel.use(mesh, rules):
    spread = decode.generate(model, jax.device_put(params, shardings), prompts, **settings)
  assert spread.tokens == alone.tokens
  for a, b in zip(alone.completions, spread.completions, strict=True):
    np.testing.assert_array_equal(a.exit_layers, b.exit_layers)


@pytest.mark.parametrize(
  ('name', 'axes'),
  [
    ('full', {'tensor': 2}),
    ('deferred', {'tensor': 4}),
    ('deferred', {'tensor': 2, 'pipeline': 2}),
  ],
)
def test_groups_on_a_mesh_equal_one_device(tiny, prompts, name, axes):
  """Rows over data, heads over tensor, layers over pipeline; texts, of which rows have several, everywhere."""
  model, params = tiny(HeadKind.LAYER)
  warm = decode.Sampler(temperature=1.0)
  groups = [
    decode.Group(
      prompt=prompt,
      thinkers=[
        decode.Thinker(header=(7 + number,), sampler=warm, seed=place) for number in range(size)
      ],
    )
    for place, (prompt, size) in enumerate(zip(prompts, (3, 1, 2, 4) * 2, strict=False))
  ]
  settings = {'config': decode.ThinkConfig(max_new_tokens=8), 'policy': POLICIES[name]}
  alone = decode.think(model, params, groups, **settings)
  mesh = parallel.make_mesh(parallel.MeshConfig(**axes))
  rules = parallel.ShardingRules()
  shardings = parallel.tree_shardings(
    jax.eval_shape(lambda: params), model.logical_axes(), mesh, rules
  )
  with parallel.use(mesh, rules):
    spread = decode.think(model, jax.device_put(params, shardings), groups, **settings)
  for ours, theirs in zip(alone, spread, strict=True):
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)
      np.testing.assert_array_equal(a.exit_layers, b.exit_layers)
