"""Stages of a pipeline against one device: the same tokens at the same thresholds, in fewer ticks."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode, parallel
from exitax.errors import UserError
from exitax.layers import HeadKind, Precision
from exitax.models import ExitConfig, ExitMatrix

NEW = 16
THRESHOLDS = np.linspace(1.0, 0.0, 21).tolist()
# Several exits on a stage, in its middle and at its end, with heads of all kinds side by side.
MANY_EXITS = (
  ExitConfig(layer=1, head=HeadKind.LAYER),
  ExitConfig(layer=2, head=HeadKind.MLP, matrix=ExitMatrix.OWN),
  ExitConfig(layer=3, head=HeadKind.LAYER),
  ExitConfig(layer=4, head=HeadKind.EMBEDDING, matrix=ExitMatrix.INPUT),
)


@pytest.fixture(scope='module')
def batch(prompts):
  """Eight rows: one shape for most tests, and so one program."""
  return prompts * 2


@contextlib.contextmanager
def _mesh(pipeline, data=1, tensor=1):
  config = parallel.MeshConfig(data=data, pipeline=pipeline, tensor=tensor)
  mesh = parallel.make_mesh(config, jax.devices()[: data * pipeline * tensor])
  with parallel.use(mesh, parallel.ShardingRules()):
    yield


def _both(model, params, prompts, *, pipeline, data=1, layers_per_stage=None, run=None, **policy):
  """Results of one device and of the stages."""
  run = {'max_new_tokens': NEW, **(run or {})}
  # Deep layers that never wait are one program instead of one per number of waiting tokens.
  deferred = decode.DeferredExit(pending_capacity=1, **policy)
  alone = decode.generate(model, params, prompts, policy=deferred, **run)
  with _mesh(pipeline, data):
    staged = decode.PipelineExit(layers_per_stage=layers_per_stage, **policy)
    return alone, decode.generate(model, params, prompts, policy=staged, **run)


def _assert_same(alone, staged):
  assert staged.tokens == alone.tokens
  for a, b in zip(alone.completions, staged.completions, strict=True):
    np.testing.assert_array_equal(a.exit_layers, b.exit_layers)
    np.testing.assert_array_equal(a.agreements, b.agreements)
    np.testing.assert_allclose(a.confidences, b.confidences, atol=1e-5)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
    np.testing.assert_array_equal(a.top_ids, b.top_ids)
    assert a.stop_reason == b.stop_reason


def _begin(model, params, prompts, policy):
  """Prepared parameters, plan and a prefilled state, under the ambient mesh."""
  plan = policy.plan(model.config)
  params = plan.placement.prepare_params(model, params)
  rows = len(prompts)
  requests = decode.make_requests(
    model.config,
    policy=policy,
    samplers=[decode.Sampler()] * rows,
    stop_tokens=(),
    seeds=range(rows),
    budgets=[NEW] * rows,
  )
  state = decode.begin(model, params, prompts, policy=policy, requests=requests, max_new_tokens=NEW)
  return params, plan, state


def _steps(model, params, plan, state, number, **rows):
  return decode.run_steps(
    model, params, state, number, plan=plan, visibility=decode.Causal(), **rows
  )


# Tokens.


@pytest.mark.parametrize('rows', [1, 8])
def test_stages_give_the_tokens_of_one_device_at_21_thresholds(tiny, batch, rows):
  model, params = tiny()
  batch = batch[:rows]
  with _mesh(2):
    placement = decode.PipelineExit(threshold=1.0).plan(model.config).placement
    staged_params = placement.prepare_params(model, params)
    # Layers that are no longer stacked may be cut as well.
    unstacked = placement.prepare_params(model, decode.prepare_params(model, params))
  jax.tree.map(np.testing.assert_array_equal, staged_params, unstacked)
  params = decode.prepare_params(model, params)
  seen = set()
  for threshold in THRESHOLDS:
    policy = decode.DeferredExit(threshold=threshold, pending_capacity=1)
    alone = decode.generate(model, params, batch, policy=policy, max_new_tokens=NEW)
    with _mesh(2):
      policy = decode.PipelineExit(threshold=threshold)
      staged = decode.generate(model, staged_params, batch, policy=policy, max_new_tokens=NEW)
    _assert_same(alone, staged)
    seen.add(alone.effective_layers)
  assert len(seen) > 5


@pytest.mark.parametrize(('pipeline', 'data'), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize('threshold', [1.0, (0.55, 0.5), 0.0])
def test_any_number_of_stages_gives_the_tokens_of_one_device(
  tiny, prompts, pipeline, data, threshold
):
  model, params = tiny()
  _assert_same(*_both(model, params, prompts, pipeline=pipeline, data=data, threshold=threshold))


@pytest.mark.parametrize('layers_per_stage', [(2, 2, 1), (1, 3, 1)])
def test_exits_of_all_kinds_anywhere_on_uneven_stages(tiny, prompts, is_oracle, layers_per_stage):
  model, params = tiny(num_layers=5, exits=MANY_EXITS)
  policy = decode.PipelineExit(threshold=(0.7, 0.7, 0.6, 0.5), layers_per_stage=layers_per_stage)
  with _mesh(3):
    result = decode.generate(
      model, params, prompts, policy=policy, max_new_tokens=NEW, prefill_chunk=3
    )
  for prompt, completion in zip(prompts, result.completions, strict=True):
    is_oracle(model, params, prompt, completion, policy)
  layers = np.concatenate([item.exit_layers for item in result.completions])
  assert len(set(layers)) >= 4


@pytest.mark.parametrize('measure', ['patience', 'cosine'])
def test_measures_that_remember_exits_on_earlier_stages(tiny, prompts, measure):
  exits = tuple(ExitConfig(layer=layer) for layer in (1, 2, 3))
  model, params = tiny(exits=exits)
  alone, staged = _both(
    model,
    params,
    prompts,
    pipeline=4,
    threshold={'patience': 0.5, 'cosine': 0.6}[measure],
    confidence=decode.Confidence(measure),
  )
  _assert_same(alone, staged)
  assert len(set(np.concatenate([item.exit_layers for item in staged.completions]))) >= 2


def test_windows_untied_matrices_decay_alternatives_and_classifiers(tiny, prompts):
  model, params = tiny(sliding_window=5, tie_embeddings=False, qk_norm=True, qkv_bias=True)
  kernel = np.random.default_rng(0).normal(size=model.config.embed_dim).astype(np.float32) / 4
  params = {**params, 'confidence': {'2': {'kernel': kernel, 'bias': np.float32(0.3)}}}
  measure = decode.Confidence.CLASSIFIER
  settings = {'confidence': measure, 'decay': 4.0, 'num_top': 3, 'layers': (2,)}
  alone, staged = _both(model, params, prompts, pipeline=2, threshold=0.6, **settings)
  _assert_same(alone, staged)
  assert 2 < staged.effective_layers < 4


def test_bfloat16_streams_and_eight_bit_matrices(tiny, prompts):
  model, params = tiny(precision=Precision.BFLOAT16)
  whole = decode.prepare_params(model, params, weights=decode.WeightFormat.INT8)
  deferred = decode.DeferredExit(threshold=0.5, pending_capacity=1)
  alone = decode.generate(model, whole, prompts, policy=deferred, max_new_tokens=NEW)
  policy = decode.PipelineExit(threshold=0.5)
  with _mesh(2):
    placement = policy.plan(model.config).placement
    prepared = placement.prepare_params(model, params, weights=decode.WeightFormat.INT8)
    staged = decode.generate(model, prepared, prompts, policy=policy, max_new_tokens=NEW)
  assert staged.tokens == alone.tokens


def test_sampling_is_a_function_of_seed_and_step(tiny, batch):
  model, params = tiny()
  samplers = [decode.Sampler(temperature=0.9, top_k=k, top_p=p) for k, p in [(0, 1), (5, 0.9)] * 4]
  run = {'sampler': samplers, 'seed': [7, 1, 7, 3, 0, 0, 0, 0]}
  alone, staged = _both(model, params, batch, pipeline=2, threshold=0.5, run=run)
  _assert_same(alone, staged)
  greedy, _ = _both(model, params, batch, pipeline=2, threshold=0.5)
  assert greedy.tokens != alone.tokens


def test_stop_tokens_and_budgets_end_rows_one_by_one(tiny, batch):
  model, params = tiny()
  whole, _ = _both(model, params, batch, pipeline=2, threshold=0.5)
  stops = [whole.tokens[0][5]]
  for budget in (1, NEW):
    run = {'stop_tokens': stops, 'max_new_tokens': budget}
    alone, staged = _both(model, params, batch, pipeline=2, threshold=0.5, run=run)
    _assert_same(alone, staged)
  assert len(staged.tokens[0]) <= 6
  assert len(set(staged.lengths.tolist())) > 1


def test_streaming_yields_what_generate_returns(tiny, batch):
  model, params = tiny()
  policy = decode.PipelineExit(threshold=0.5)
  with _mesh(2):
    whole = decode.generate(model, params, batch, policy=policy, max_new_tokens=NEW)
    events = list(decode.stream(model, params, batch, policy=policy, max_new_tokens=NEW))
  for row, tokens in enumerate(whole.tokens):
    assert [t for event in events for t in event.gains[row].tokens.tolist()] == tokens
  assert all(any(len(gain.tokens) for gain in event.gains) for event in events)
  assert len(events) > NEW  # Rows are at different depths: not all of them gain in every event.


@pytest.mark.parametrize('chunk', [2, 128])
def test_the_size_of_prefill_chunks_changes_nothing(tiny, batch, chunk):
  model, params = tiny()
  run = {'prefill_chunk': chunk}
  _assert_same(*_both(model, params, batch, pipeline=2, threshold=0.5, run=run))


# Ticks.


@pytest.mark.parametrize('pipeline', [2, 4])
def test_a_token_takes_as_many_ticks_as_its_exit_is_deep(tiny, batch, prompts, pipeline):
  model, params = tiny()
  prompts = batch if pipeline == 2 else prompts
  for threshold in (1.0, 0.55, 0.0):
    with _mesh(pipeline):
      policy = decode.PipelineExit(threshold=threshold)
      prepared, plan, state = _begin(model, params, prompts, policy)
      state = _steps(model, prepared, plan, state, NEW * pipeline)
    ticks = np.asarray(state.aux.extra[decode.TICKS])
    results = decode.completions_since(state, np.zeros(len(prompts), np.int32))
    stages = {depth: plan.stages.stage_of(depth) + 1 for depth in model.config.depths}
    expected = [sum(stages[layer] for layer in item.exit_layers) for item in results]
    np.testing.assert_array_equal(ticks, expected)
    if threshold in (0.0, 1.0):  # Exits after the first stage's layers, or never.
      np.testing.assert_array_equal(ticks, NEW * (1 if threshold == 0.0 else pipeline))


def test_an_exit_at_a_cut_is_judged_before_it(tiny):
  model, _ = tiny()
  with _mesh(2):
    tables = decode.PipelineExit(threshold=0.5).plan(model.config).stages
  assert tables.segments == (range(2), range(2, 4))
  assert tables.exits_of == ((0, 1), (2,))
  assert tables.exit_places.tolist() == [[0, 1], [1, -1]]


# The state.


def test_rows_that_wait_keep_what_is_on_its_way(tiny, prompts):
  """Rows held back with tokens in flight go on later as if nothing had been."""
  model, params = tiny()
  with _mesh(4):
    policy = decode.PipelineExit(threshold=0.5)
    prepared, plan, state = _begin(model, params, prompts, policy)
    whole = _steps(model, prepared, plan, state, NEW * 4)
    prepared, plan, state = _begin(model, params, prompts, policy)
    mine = jnp.asarray([True, False, True, False])
    turn = 0
    while not np.all(state.done):
      state = _steps(model, prepared, plan, state, 3, rows=mine if turn % 2 else ~mine)
      turn += 1
  np.testing.assert_array_equal(whole.tokens, state.tokens)
  np.testing.assert_array_equal(whole.aux.extra[decode.TICKS], state.aux.extra[decode.TICKS])


def test_rows_come_first_in_all_that_a_state_holds(tiny, prompts):
  model, params = tiny()
  order = jnp.asarray([2, 0, 0, 3])
  with _mesh(4):
    policy = decode.PipelineExit(threshold=0.5)
    prepared, plan, state = _begin(model, params, prompts, policy)
    whole = _steps(model, prepared, plan, state, NEW * 4)
    prepared, plan, state = _begin(model, params, prompts, policy)
    state = decode.gather_rows(_steps(model, prepared, plan, state, 6), order)
    assert np.any(np.diff(state.fill, axis=1))  # Tokens are in flight.
    state = _steps(model, prepared, plan, state, NEW * 4)
  np.testing.assert_array_equal(whole.tokens[order], state.tokens)


def test_stale_caches_and_streams_are_never_read(tiny, prompts):
  model, params = tiny(HeadKind.LAYER, num_layers=5)

  def poison(state):
    """Everything that no stage has written, or will write before it reads it."""
    columns = jnp.arange(state.tokens.shape[1])
    heads = model.config.num_kv_heads
    stale = columns >= state.fill[:, :, None]  # [rows, stages, capacity]
    by_head = jnp.repeat(stale, heads, axis=1)[..., None]
    spoil = lambda entry: jax.tree.map(lambda x: jnp.where(by_head, 1e4, x), entry)  # noqa: E731
    cache = state.cache.replace(
      layers=tuple(spoil(x) for x in state.cache.layers),
      heads={slot: spoil(x) for slot, x in state.cache.heads.items()},
    )
    empty = jnp.diff(state.fill, axis=1, prepend=state.fill[:, :1]) == 0
    pending = tuple(jnp.where(empty[..., None], 1e4, x) for x in state.pending)
    return state.replace(cache=cache, pending=pending)

  with _mesh(2, data=2):
    policy = decode.PipelineExit(threshold=0.55)
    prepared, plan, state = _begin(model, params, prompts, policy)
    clean = _steps(model, prepared, plan, state, NEW * 2)
    prepared, plan, state = _begin(model, params, prompts, policy)
    dirty = _steps(model, prepared, plan, poison(state), 5)
    dirty = _steps(model, prepared, plan, poison(dirty), NEW * 2)
  np.testing.assert_array_equal(clean.tokens, dirty.tokens)
  np.testing.assert_array_equal(clean.aux.confidence, dirty.aux.confidence)


def test_a_device_holds_its_own_stage_and_copies_no_cache(tiny, prompts):
  """5 layers on 2 stages, 2 rows for each of 2 devices of a stage."""
  model, params = tiny(HeadKind.LAYER, num_layers=5)
  with _mesh(2, data=2):
    policy = decode.PipelineExit(threshold=0.5)
    prepared, plan, state = _begin(model, params, prompts, policy)
    lowered = decode.run_steps.jitted.lower(
      model, prepared, state, 9, plan=plan, visibility=decode.Causal()
    )
  assert len(state.cache.layers) == 3
  assert len(state.cache.heads) == 2  # Both exits are on the first stage.
  entries = jax.tree.leaves((state.cache.layers, state.cache.heads))
  assert {x.addressable_shards[0].data.shape for x in entries} == {(2, 2, 64, 8)}
  assert {x.addressable_shards[0].data.shape for x in state.pending} == {(2, 1, 32)}
  for leaf in jax.tree.leaves(prepared['stages']):
    assert leaf.shape[0] == 2
    assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
  program = lowered.compile().as_text()
  sizes = {'f32[2,2,64,8]', 'f32[4,4,64,8]'} | {
    f'f32[{",".join(map(str, leaf.shape[1:]))}]'
    for leaf in jax.tree.leaves(prepared['stages']['blocks'])
    if leaf.ndim > 2
  }
  assert 'f32[2,2,64,8]' in program
  lines = program.splitlines()
  copies = [line for line in lines if ' copy(' in line and any(f'= {x}' in line for x in sizes)]
  assert not copies
  # What travels in a tick: seven words and a stream per row; and whether all rows are done.
  kinds = ('all-reduce', 'collective-permute', 'all-gather', 'all-to-all', 'reduce-scatter')
  sent = [line for line in lines if any(f' {kind}(' in line for kind in kinds)]
  shapes = sorted(line.split('= ')[1].split(' ')[0].split('{')[0] for line in sent)
  assert shapes == ['f32[2,1,32]', 'pred[]', 's32[2,7]']


# Bad input.


@pytest.mark.parametrize(
  ('mesh', 'policy', 'message'),
  [
    (None, {}, 'runs on a mesh with a pipeline axis, and there is none'),
    ({'pipeline': 2, 'tensor': 2}, {}, 'mesh tensor=2: strategy=pipeline has whole layers'),
    ({'pipeline': 8}, {}, 'pipeline=8 is more than num_layers=4: choose at most 4 stages'),
    ({'pipeline': 2}, {'layers_per_stage': (1, 2)}, r'layers_per_span=\(1, 2\) must be 2 numbers'),
    ({'pipeline': 2}, {'layers': (3,)}, 'no exit at layer 3'),
    ({'pipeline': 2}, {'threshold': 1.5}, 'threshold=1.5 is outside'),
    ({'pipeline': 2}, {'patience': 0}, 'patience=0 must be at least 1'),
  ],
)
def test_what_cannot_be_staged_is_said(tiny, prompts, mesh, policy, message):
  model, params = tiny()
  policy = decode.PipelineExit(**{'threshold': 0.5, **policy})
  place = _mesh(**mesh) if mesh else contextlib.nullcontext()
  with place, pytest.raises(UserError, match=message):
    decode.generate(model, params, prompts, policy=policy, max_new_tokens=4)


def test_parameters_of_other_stages_are_refused(tiny, prompts):
  model, params = tiny()
  policy = decode.PipelineExit(threshold=0.5)
  with _mesh(2):
    prepared = policy.plan(model.config).placement.prepare_params(model, params)
  with _mesh(4), pytest.raises(UserError, match='prepared for 2 stages of up to 2 layers, not'):
    decode.generate(model, prepared, prompts, policy=policy, max_new_tokens=4)
