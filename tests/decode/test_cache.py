import jax
import jax.numpy as jnp
import numpy as np

from exitax import decode


def _written(tiny, lanes, *, rows=3, capacity=8, num_lanes=2):
  model, _ = tiny()
  cache = decode.init_cache(model.config, rows=rows, capacity=capacity)
  entry = jax.tree.map(lambda x: jnp.full_like(x, -1.0), cache.layers[0])
  shape = (rows, num_lanes, model.config.num_kv_heads, model.config.head_dim)
  new = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  return np.asarray(decode.write_layer(entry, new, new, lanes).key), np.asarray(new)


def test_lanes_are_written_to_each_rows_own_columns(tiny):
  first, count = jnp.array([0, 3, 5]), jnp.array([2, 1, 0])
  key, new = _written(tiny, decode.consecutive_lanes(first, count, num_lanes=2))
  np.testing.assert_array_equal(key[0, :, 0:2], new[0].swapaxes(0, 1))
  np.testing.assert_array_equal(key[1, :, 3], new[1, 0])
  assert (key[0, :, 2:] == -1).all()
  assert (key[1, :, :3] == -1).all()
  assert (key[2] == -1).all()  # No valid lane: nothing is written, padding neither.


def test_a_window_beyond_the_capacity_is_dropped_not_shifted(tiny):
  first, count = jnp.array([7, 6, 0]), jnp.array([2, 2, 2])
  key, new = _written(tiny, decode.consecutive_lanes(first, count, num_lanes=2))
  assert (key[0] == -1).all()
  np.testing.assert_array_equal(key[1, :, 6:8], new[1].swapaxes(0, 1))


def test_truncate_hides_columns_and_keeps_what_they_hold(tiny):
  model, _ = tiny()
  cache = decode.init_cache(model.config, rows=2, capacity=6)
  columns = cache.columns.replace(valid=jnp.ones((2, 6), bool))
  cut = decode.truncate(cache.replace(columns=columns), jnp.array([2, 5]))
  np.testing.assert_array_equal(cut.columns.valid.sum(1), [2, 5])
  assert cut.columns.valid[0, :2].all()


def test_fork_then_diverge_equals_separate_requests(tiny, prompts):
  """One prefilled row becomes three that sample with seeds of their own."""
  model, params = tiny()
  params = decode.prepare_params(model, params)
  policy = decode.DeferredExit(threshold=0.6, pending_capacity=4)
  plan, visibility = policy.plan(model.config), decode.Causal()
  sampler, prompt = decode.Sampler(temperature=1.0), prompts[0]

  def state_of(rows, seeds):
    tokens = np.zeros((rows, 64), np.int32)
    tokens[:, : len(prompt)] = prompt
    requests = decode.make_requests(
      model.config,
      policy=policy,
      samplers=[sampler] * rows,
      stop_tokens=(),
      seeds=seeds,
      budgets=[12] * rows,
    )
    lengths = np.full((rows,), len(prompt), np.int32)
    state = decode.init_state(
      model.config, plan, tokens=tokens, prompt_length=lengths, requests=requests
    )
    return decode.prefill_chunk(model, params, state, chunk=8, visibility=visibility)

  def run(state, steps):
    return decode.run_steps(model, params, state, steps, plan=plan, visibility=visibility)

  trunk = run(state_of(1, [5]), 4)
  forked = decode.gather_rows(trunk, jnp.array([0, 0, 0]))
  seeds = np.array([5, 6, 7], np.uint32)
  forked = run(forked.replace(requests=forked.requests.replace(seed=seeds)), 20)
  for row, seed in enumerate(seeds.tolist()):
    alone = run(state_of(1, [5]), 4)
    alone = run(alone.replace(requests=alone.requests.replace(seed=seeds[row : row + 1])), 20)
    np.testing.assert_array_equal(forked.tokens[row, :20], alone.tokens[0, :20], err_msg=str(seed))
  assert len({tuple(row) for row in np.asarray(forked.tokens[:, :20]).tolist()}) == 3
