import numpy as np
import pytest

from exitax import decode
from exitax.errors import UserError

POLICY = decode.DeferredExit(threshold=0.55, pending_capacity=4)
NEW = 24


def _generate(tiny, prompts, **changes):
  model, params = tiny()
  settings = {'max_new_tokens': NEW, 'policy': POLICY, **changes}
  return decode.generate(model, params, prompts, **settings)


def test_full_depth_gives_the_oracles_tokens(tiny, prompts, is_oracle):
  model, params = tiny()
  policy = decode.FullDepth()
  result = _generate(tiny, prompts, policy=policy)
  for prompt, completion in zip(prompts, result.completions, strict=True):
    is_oracle(model, params, prompt, completion, policy)
    assert (completion.agreements == decode.Agreement.SAME).all()
    assert completion.stop_reason is decode.StopReason.BUDGET
  assert result.effective_layers == 4.0
  np.testing.assert_array_equal(result.lengths, [NEW] * 4)


def test_the_size_of_prefill_chunks_changes_nothing(tiny, prompts):
  whole = _generate(tiny, prompts)
  for chunk in (1, 4):
    assert _generate(tiny, prompts, prefill_chunk=chunk).tokens == whole.tokens


def test_a_stop_token_ends_its_row_and_no_other(tiny, prompts):
  free = _generate(tiny, prompts)
  stop = free.tokens[0][5]
  stopped = _generate(tiny, prompts, stop_tokens=[47, stop])
  for before, after in zip(free.tokens, stopped.completions, strict=True):
    ends = [i for i, token in enumerate(before) if token in (47, stop)]
    expected = before[: ends[0] + 1] if ends else before
    assert after.tokens.tolist() == expected
    reason = decode.StopReason.STOP_TOKEN if ends else decode.StopReason.BUDGET
    assert after.stop_reason is reason
  assert len(stopped.tokens[0]) <= 6


def test_streaming_equals_one_call(tiny, prompts):
  sampler = decode.Sampler(temperature=0.8, top_k=20, top_p=0.9)
  settings = {'sampler': sampler, 'seed': 11, 'stop_tokens': [5]}
  whole = _generate(tiny, prompts, **settings)
  model, params = tiny()
  for size in (1, 5):
    events = decode.stream(
      model,
      params,
      prompts,
      max_new_tokens=NEW,
      policy=POLICY,
      tokens_per_event=size,
      **settings,
    )
    events = list(events)
    assert len(events) == -(-int(whole.lengths.max()) // size)
    for row, completion in enumerate(whole.completions):
      gains = [event.gains[row] for event in events]
      assert all(len(gain.tokens) <= size for gain in gains)
      for name in ('tokens', 'exit_layers', 'confidences'):
        joined = np.concatenate([getattr(gain, name) for gain in gains])
        np.testing.assert_array_equal(joined, getattr(completion, name))
      assert gains[-1].stop_reason is completion.stop_reason


def test_seeds_belong_to_requests(tiny, prompts):
  sampler = decode.Sampler(temperature=1.0)
  first = _generate(tiny, [prompts[0]] * 4, sampler=sampler, seed=np.int64(3))
  second = _generate(tiny, [prompts[0]] * 4, sampler=sampler, seed=[6, 5, 4, 3])
  assert second.tokens == first.tokens[::-1]
  assert len({tuple(row) for row in first.tokens}) == 4


def test_samplers_may_differ_by_row(tiny, prompts):
  greedy = _generate(tiny, prompts)
  mixed = _generate(
    tiny, prompts, sampler=[decode.Sampler(), *[decode.Sampler(temperature=2.0)] * 3]
  )
  assert mixed.tokens[0] == greedy.tokens[0]
  assert mixed.tokens[1] != greedy.tokens[1]


def test_a_prompt_may_fill_the_context_to_the_last_token(tiny):
  model, params = tiny()
  prompt = list(range(40)) * 3
  result = decode.generate(model, params, [prompt], max_new_tokens=8, prefill_chunk=50)
  assert len(result.tokens[0]) == 8
  with pytest.raises(
    UserError,
    match=r'prompt of 120 tokens plus max_new_tokens=9 exceeds the context of 128: .* at most 8',
  ):
    decode.generate(model, params, [prompt], max_new_tokens=9)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'prompts': []}, 'no prompts'),
    ({'prompts': [[1], []]}, 'prompt 1 is empty'),
    ({'prompts': [[1, 48]]}, 'token 48, outside the vocabulary of 48'),
    ({'prompts': [[1, -2]]}, 'token -2'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'prefill_chunk': 0}, 'prefill_chunk=0'),
    ({'seed': [1, 2]}, '2 values of seed for 1 prompts'),
    ({'seed': 1.5}, 'seed=1.5 is no whole number'),
    ({'seed': [1.5]}, r'seed=\[1.5\] is no whole number'),
    ({'policy': decode.DeferredExit(threshold=('a', 'b'))}, "threshold='a' is no number"),
    ({'sampler': [decode.Sampler()] * 2}, '2 values of sampler'),
    ({'policy': decode.DeferredExit(threshold=1.2)}, r'threshold=1.2 is outside \[0, 1\]'),
    ({'policy': decode.DeferredExit(threshold=(0.5, -0.1))}, 'threshold=-0.1'),
    ({'policy': decode.DeferredExit(threshold=(0.5,))}, '1 thresholds for 2 exits'),
    ({'policy': decode.DeferredExit(threshold=0.5, layers=(3,))}, 'no exit at layer 3'),
    ({'policy': decode.DeferredExit(threshold=0.5, pending_capacity=0)}, 'pending_capacity=0'),
  ],
)
def test_wrong_input_is_named_before_anything_runs(tiny, changes, message):
  with pytest.raises(UserError, match=message):
    _generate(tiny, **{'prompts': [[1, 2]], **changes})


def test_streaming_checks_its_input_at_the_call(tiny):
  model, params = tiny()
  with pytest.raises(UserError, match='no prompts'):
    decode.stream(model, params, [], max_new_tokens=1)
  with pytest.raises(UserError, match='tokens_per_event=0'):
    decode.stream(model, params, [[1]], max_new_tokens=1, tokens_per_event=0)
