import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.layers import HeadKind
from exitax.models import ExitConfig, ExitMatrix

NEW = 24


def _policy(threshold, **changes):
  return decode.DeferredExit(threshold=threshold, **{'pending_capacity': 4, **changes})


def _tokens(model, params, prompts, policy, **changes):
  return decode.generate(model, params, prompts, max_new_tokens=NEW, policy=policy, **changes)


@pytest.mark.parametrize('head', HeadKind)
def test_every_head_kind_gives_the_oracles_tokens_in_a_ragged_batch(tiny, prompts, is_oracle, head):
  model, params = tiny(head)
  policy = _policy((0.55, 0.5))
  result = _tokens(model, params, prompts, policy)
  for prompt, completion in zip(prompts, result.completions, strict=True):
    is_oracle(model, params, prompt, completion, policy)
  layers = np.concatenate([item.exit_layers for item in result.completions])
  assert set(layers) == {1, 2, 4}  # The comparison has something to compare.


@pytest.mark.parametrize(
  'changes',
  [
    {'sliding_window': 5},
    {'qk_norm': True, 'qkv_bias': True, 'num_kv_heads': 1},
    {
      'exits': (ExitConfig(layer=2, head=HeadKind.LAYER, matrix=ExitMatrix.OWN),),
      'tie_embeddings': False,
      'sliding_window': 9,
    },
  ],
  ids=['sliding_window', 'qk_norm_mqa', 'own_matrix'],
)
def test_every_architecture_gives_the_oracles_tokens(tiny, prompts, is_oracle, changes):
  model, params = tiny(HeadKind.NORM, **changes)
  policy = _policy(0.55)
  result = _tokens(model, params, prompts, policy)
  for prompt, completion in zip(prompts, result.completions, strict=True):
    is_oracle(model, params, prompt, completion, policy)
  assert 1 < result.effective_layers < 4


@pytest.mark.parametrize('confidence', decode.OF_SCORES)
def test_21_thresholds_give_the_oracles_tokens_without_recompiling(
  tiny, prompts, is_oracle, confidence
):
  model, params = tiny()
  params_prepared = decode.prepare_params(model, params)
  effective, compiled = [], set()
  for threshold in np.linspace(1.0, 0.0, 21).tolist():
    policy = _policy(threshold, confidence=confidence)
    result = _tokens(model, params_prepared, prompts, policy)
    for prompt, completion in zip(prompts, result.completions, strict=True):
      is_oracle(model, params, prompt, completion, policy)
    effective.append(result.effective_layers)
    compiled.add(decode.run_steps.jitted._cache_size())
  assert len(compiled) == 1
  assert effective[0] == 4.0
  assert effective[-1] < 1.5
  assert len(set(effective)) > 5


def test_threshold_one_never_exits_and_equals_full_depth(tiny, prompts):
  """Even where the confidence rounds to exactly 1."""
  model, params = tiny()
  params = jax.tree.map(lambda x: x * 4, params)
  full = _tokens(model, params, prompts, decode.FullDepth())
  never = _tokens(model, params, prompts, _policy(1.0))
  assert never.tokens == full.tokens
  assert all((item.exit_layers == 4).all() for item in never.completions)
  easy = _tokens(model, params, prompts, _policy(0.999))
  assert easy.effective_layers < 4.0
  assert max(item.confidences.max() for item in easy.completions) == 1.0


def test_forced_filling_changes_caches_only(tiny, prompts, is_oracle):
  model, params = tiny(HeadKind.LAYER)
  results = {}
  for capacity in (1, 4):
    policy = _policy(0.4, pending_capacity=capacity)
    results[capacity] = _tokens(model, params, prompts, policy)
    for prompt, completion in zip(prompts, results[capacity].completions, strict=True):
      is_oracle(model, params, prompt, completion, policy)
  assert results[1].tokens == results[4].tokens
  # Capacity 1 fills after every token; a larger one saves passes of the deep layers.
  assert (results[1].completions[0].passes == NEW).all()
  assert results[4].completions[0].passes[2] < NEW


def test_agreement_is_known_for_every_token_when_asked_for(tiny, prompts, all_logits):
  model, params = tiny()
  watched = _tokens(model, params, prompts, _policy(0.5, record=decode.Record.AGREEMENT))
  quick = _tokens(model, params, prompts, _policy(0.5))
  assert watched.tokens == quick.tokens
  seen = set()
  for prompt, full, lazy in zip(prompts, watched.completions, quick.completions, strict=True):
    sequence = np.zeros((1, 64), np.int32)
    sequence[0, : len(prompt) + NEW] = [*prompt, *full.tokens]
    final = np.asarray(all_logits(model, params, sequence))[-1, 0].argmax(-1)
    expected = final[len(prompt) - 1 : len(prompt) - 1 + NEW] == full.tokens
    np.testing.assert_array_equal(full.agreements, expected)
    early = lazy.exit_layers < 4
    assert (lazy.agreements[early] == decode.Agreement.UNKNOWN).all()
    assert (lazy.agreements[~early] == decode.Agreement.SAME).all()
    seen |= set(full.agreements.tolist())
  assert seen == {0, 1}


def test_a_subset_of_exits_may_be_used(tiny, prompts):
  model, params = tiny()
  result = _tokens(model, params, prompts, _policy(0.5, layers=(2,)))
  layers = set(np.concatenate([item.exit_layers for item in result.completions]).tolist())
  assert layers == {2, 4}


def test_rows_do_not_depend_on_their_neighbours_or_their_place(tiny, prompts):
  model, params = tiny(HeadKind.LAYER)
  policy = _policy(0.55)
  sampler = decode.Sampler(temperature=0.7)
  settings = {'policy': policy, 'max_new_tokens': NEW, 'sampler': sampler}
  together = decode.generate(model, params, prompts, seed=[4, 5, 6, 7], **settings)
  order = [2, 0, 3, 1]
  moved = decode.generate(
    model, params, [prompts[i] for i in order], seed=[4 + i for i in order], **settings
  )
  assert moved.tokens == [together.tokens[i] for i in order]
  for i, prompt in enumerate(prompts):
    alone = decode.generate(model, params, [prompt], seed=4 + i, **settings)
    assert alone.tokens[0] == together.tokens[i]
    np.testing.assert_array_equal(
      alone.completions[0].exit_layers, together.completions[i].exit_layers
    )


def test_stale_cache_and_pending_entries_are_never_read(tiny, prompts):
  model, params = tiny(HeadKind.LAYER)
  params = decode.prepare_params(model, params)
  policy = _policy(0.55)
  plan, visibility = policy.plan(model.config), decode.Causal()

  def start():
    tokens, lengths = np.zeros((4, 64), np.int32), np.array([len(item) for item in prompts])
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)] = prompt
    requests = decode.make_requests(
      model.config,
      policy=policy,
      samplers=[decode.Sampler()] * 4,
      stop_tokens=(),
      seeds=range(4),
      budgets=[NEW] * 4,
    )
    state = decode.init_state(
      model.config, plan, tokens=tokens, prompt_length=lengths, requests=requests
    )
    state = decode.prefill_chunk(model, params, state, chunk=8, visibility=visibility)
    # To a moment when deep layers lag behind, or the test would show little.
    waiting = np.zeros(4)
    while not waiting.any():
      state = decode.run_steps(model, params, state, 1, plan=plan, visibility=visibility)
      waiting = np.asarray(state.fill[:, 0] - state.fill[:, -1])
    return state

  def poison(state):
    columns = jnp.arange(64)
    fill = np.asarray(state.fill)
    owners = [next(s for s, seg in enumerate(plan.segments) if i in seg) for i in range(4)]

    def spoil(entry, segment):
      stale = (columns >= fill[:, segment, None])[:, None, :, None]
      return jax.tree.map(lambda x: jnp.where(stale, 1e4, x), entry)

    cache = state.cache.replace(
      layers=tuple(spoil(x, s) for x, s in zip(state.cache.layers, owners, strict=True)),
      heads={layer: spoil(x, s) for s, (layer, x) in enumerate(state.cache.heads.items())},
    )
    waiting = fill[:, :-1] - fill[:, 1:]
    slot = jnp.arange(plan.pending_capacity)
    pending = tuple(
      jnp.where((slot >= waiting[:, s, None])[:, :, None], 1e4, x)
      for s, x in enumerate(state.pending)
    )
    return state.replace(cache=cache, pending=pending)

  clean = decode.run_steps(model, params, start(), NEW, plan=plan, visibility=visibility)
  dirty = decode.run_steps(model, params, poison(start()), NEW, plan=plan, visibility=visibility)
  np.testing.assert_array_equal(clean.tokens, dirty.tokens)
  np.testing.assert_array_equal(clean.aux.confidence, dirty.aux.confidence)


@pytest.mark.parametrize('rows', [1, 4])
def test_no_step_copies_the_cache(tiny, rows):
  """The compiled loop updates every cache entry in place, whichever segments run."""
  model, params = tiny(HeadKind.LAYER)
  params = decode.prepare_params(model, params)
  policy = _policy(0.5)
  plan = policy.plan(model.config)
  requests = decode.make_requests(
    model.config,
    policy=policy,
    samplers=[decode.Sampler()] * rows,
    stop_tokens=(),
    seeds=range(rows),
    budgets=[9] * rows,
  )
  state = decode.init_state(
    model.config,
    plan,
    tokens=np.zeros((rows, 64), np.int32),
    prompt_length=np.ones((rows,), np.int32),
    requests=requests,
  )
  lowered = decode.run_steps.jitted.lower(
    model, params, state, 9, plan=plan, visibility=decode.Causal()
  )
  program = lowered.compile().as_text()
  entry = f'f32[{rows},2,64,8]'
  assert entry in program
  copies = [line for line in program.splitlines() if f'= {entry}' in line and ' copy(' in line]
  assert not copies
