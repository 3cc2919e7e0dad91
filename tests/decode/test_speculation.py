import jax
import numpy as np
import pytest

from exitax import decode
from exitax.errors import UserError
from exitax.layers import HeadKind

NEW = 24


def _generate(model, params, prompts, policy, **changes):
  settings = {'max_new_tokens': NEW, 'policy': policy, **changes}
  return decode.generate(model, params, prompts, **settings)


FIXED = decode.Speculative(exit_layer=1, num_drafts=3)
SAMPLERS = {
  'greedy': decode.Sampler(),
  'temperature': decode.Sampler(temperature=0.7),
  'filters': decode.Sampler(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize('sampler', SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(
  'policy',
  [FIXED, decode.Speculative(exit_layer=2, num_drafts=5), decode.Speculative()],
  ids=['shallow', 'deep', 'adaptive'],
)
def test_tokens_are_those_of_full_depth_in_a_ragged_batch(tiny, prompts, policy, sampler):
  """Also when sampling: both choose with the same random numbers."""
  model, params = tiny()
  full = _generate(model, params, prompts, decode.FullDepth(), sampler=sampler, seed=3)
  quick = _generate(model, params, prompts, policy, sampler=sampler, seed=3)
  assert quick.tokens == full.tokens
  for a, b in zip(quick.completions, full.completions, strict=True):
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-3)


@pytest.mark.parametrize('head', [HeadKind.EMBEDDING, HeadKind.MLP, HeadKind.LAYER])
def test_every_head_kind_drafts(tiny, prompts, head):
  model, params = tiny(head)
  full = _generate(model, params, prompts, decode.FullDepth())
  quick = _generate(model, params, prompts, FIXED)
  assert quick.tokens == full.tokens


def _state_after(model, params, prompts, policy, **changes):
  params = decode.prepare_params(model, params)
  requests = decode.make_requests(
    model.config,
    policy=policy,
    samplers=[decode.Sampler()] * len(prompts),
    stop_tokens=(),
    seeds=range(len(prompts)),
    budgets=[NEW] * len(prompts),
  )
  state = decode.begin(
    model, params, prompts, policy=policy, requests=requests, max_new_tokens=NEW, **changes
  )
  plan = policy.plan(model.config)
  return decode.run_steps(model, params, state, NEW, plan=plan, visibility=decode.Causal())


def test_rounds_passes_and_records_agree(tiny, prompts):
  model, params = tiny()
  state = _state_after(model, params, prompts, FIXED)
  stats = jax.device_get(state.aux.extra[decode.STATS])
  completions = decode.completions_since(state, np.zeros(4, np.int32))
  for row, completion in enumerate(completions):
    rounds = stats.rounds[row]
    assert completion.passes.tolist() == [rounds * 4, rounds, rounds]
    early = completion.exit_layers == 1
    # The last round may have been cut by the budget.
    assert stats.accepted[row, 0] - 3 <= early.sum() <= stats.accepted[row, 0]
    assert NEW <= rounds + stats.accepted[row, 0] < NEW + 4
    assert stats.drafted[row].tolist() == [rounds * 3, 0]
  assert stats.accepted.sum() > 5  # Something was drafted well.
  assert stats.accepted.sum() < stats.drafted.sum()  # And something was not.


def test_stop_tokens_within_a_run_end_the_row(tiny, prompts):
  model, params = tiny()
  free = _generate(model, params, prompts, decode.FullDepth())
  stop = free.tokens[0][5]
  full = _generate(model, params, prompts, decode.FullDepth(), stop_tokens=[stop])
  quick = _generate(model, params, prompts, FIXED, stop_tokens=[stop])
  assert quick.tokens == full.tokens
  assert [x.stop_reason for x in quick.completions] == [x.stop_reason for x in full.completions]


def test_a_prompt_may_fill_the_context(tiny):
  model, params = tiny()
  prompt = list(range(40)) * 3
  full = decode.generate(model, params, [prompt], max_new_tokens=8)
  quick = decode.generate(model, params, [prompt], max_new_tokens=8, policy=FIXED)
  assert quick.tokens == full.tokens


def test_rows_may_take_turns_under_different_plans(tiny, prompts):
  """Rows 0 and 2 speculate, 1 and 3 exit at thresholds: each gets what it would get alone."""
  model, params = tiny()
  drafts = decode.Speculative(pending_capacity=4)
  exits = decode.DeferredExit(threshold=0.55, pending_capacity=4)
  alone = {
    policy: _generate(model, params, prompts, policy).tokens
    for policy in (decode.FullDepth(), exits)
  }
  params = decode.prepare_params(model, params)
  requests = decode.make_requests(
    model.config,
    policy=exits,
    samplers=[decode.Sampler()] * 4,
    stop_tokens=(),
    seeds=range(4),
    budgets=[NEW] * 4,
  )
  state = decode.begin(model, params, prompts, policy=drafts, requests=requests, max_new_tokens=NEW)
  turns = {drafts: np.array([1, 0, 1, 0], bool), exits: np.array([0, 1, 0, 1], bool)}
  while not np.all(state.done):
    for policy, rows in turns.items():
      state = decode.run_steps(
        model,
        params,
        state,
        2,
        plan=policy.plan(model.config),
        visibility=decode.Causal(),
        rows=rows,
      )
  found = [item.tokens.tolist() for item in decode.completions_since(state, np.zeros(4, np.int32))]
  expected = [alone[decode.FullDepth() if row % 2 == 0 else exits][row] for row in range(4)]
  assert found == expected


def test_useless_exits_are_soon_left_alone(tiny, prompts):
  """Exits that never agree: the rule goes back to plain steps, and looks again now and then."""
  model, params = tiny()
  params = {**params, 'exits': jax.tree.map(lambda x: -x, params['exits'])}
  state = _state_after(model, params, prompts, decode.Speculative())
  stats = jax.device_get(state.aux.extra[decode.STATS])
  assert (stats.accepted.sum(axis=1) <= 2).all()
  assert (stats.drafted.sum(axis=1) < NEW).all()
  assert (stats.rounds >= NEW - 2).all()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'exit_layer': 1}, 'exit_layer and num_drafts are given together'),
    ({'exit_layer': 3, 'num_drafts': 2}, 'no exit at layer 3: the model has exits at layers 1, 2'),
    ({'max_drafts': 0}, '0 drafts a round are outside 1 to 31'),
    ({'exit_layer': 1, 'num_drafts': 32}, '32 drafts a round'),
    ({'layers': ()}, 'speculation drafts at exits, and this model has none'),
    ({'confidence': decode.Confidence.COSINE}, 'confidence=cosine has no use in speculation'),
  ],
)
def test_wrong_settings_are_named(tiny, changes, message):
  model, _ = tiny()
  with pytest.raises(UserError, match=message):
    decode.Speculative(**changes).plan(model.config)
