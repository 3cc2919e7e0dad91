import jax
import pytest

from exitax import decode, parallel
from exitax.layers import HeadKind


@pytest.mark.parametrize('tensor', [2, 4], ids=['data4_tensor2', 'data2_tensor4'])
def test_decoding_on_a_mesh_equals_one_device(tiny, prompts, tensor):
  """Rows over data, heads over tensor, parameters sharded as in training (FSDP and tensor)."""
  model, params = tiny(HeadKind.LAYER)
  policy = decode.DeferredExit(threshold=(0.55, 0.5), pending_capacity=4)
  settings = {'max_new_tokens': 24, 'policy': policy}
  alone = decode.generate(model, params, prompts, **settings)
  mesh = parallel.make_mesh(parallel.MeshConfig(tensor=tensor))
  rules = parallel.ShardingRules()
  shapes = jax.eval_shape(lambda: params)
  shardings = parallel.tree_shardings(shapes, model.logical_axes(), mesh, rules)
  with parallel.use(mesh, rules):
    spread = decode.generate(model, jax.device_put(params, shardings), prompts, **settings)
  assert spread.tokens == alone.tokens
