from __future__ import annotations

import numpy as np
import pytest

from exitax import data, decode
from exitax.errors import UserError
from exitax.evaluate import PromptDecoder, held_out_prompts
from exitax.models import ExitConfig


@pytest.fixture(scope='module')
def prompts(corpus):
  return held_out_prompts(corpus, count=3, num_tokens=6)


@pytest.mark.parametrize('threshold', [None, 1.0, 0.3, 0.0])
def test_it_decodes_what_generate_does(loaded, prompts, threshold):
  decoder = PromptDecoder(
    loaded.model,
    loaded.params,
    [prompts[0], prompts[1][:3]],
    new_tokens=10,
    confidence=decode.Confidence.MARGIN,
  )
  policy = decode.FullDepth()
  if threshold is not None:
    policy = decode.DeferredExit(threshold=threshold, confidence=decode.Confidence.MARGIN)
  for i, prompt in enumerate([prompts[0], prompts[1][:3]]):
    decoded = decoder(i, threshold)
    expected = decode.generate(
      loaded.model, loaded.params, [prompt], max_new_tokens=10, policy=policy
    ).completions[0]
    np.testing.assert_array_equal(decoded.tokens, expected.tokens)
    np.testing.assert_array_equal(decoded.exit_layers, expected.exit_layers)
    assert len(decoded.tokens) == 10
    assert decoded.seconds > 0
    least = 10 if threshold == 0.0 else int(expected.exit_layers.max())
    assert least <= decoded.layer_passes <= 30
    if threshold in (None, 1.0):
      assert decoded.layer_passes == 30


def test_facts_of_the_decoder(loaded, prompts):
  decoder = PromptDecoder(
    loaded.model,
    loaded.params,
    prompts,
    new_tokens=4,
    confidence=decode.Confidence.MAX_PROB,
  )
  assert (decoder.num_prompts, decoder.prompt_tokens, decoder.has_exits) == (3, 6, True)
  assert loaded.model.config.exits == (ExitConfig(layer=1), ExitConfig(layer=2))


@pytest.mark.parametrize('prefix', ['', 'speed_'])
def test_what_exceeds_the_context_is_refused(loaded, prompts, prefix):
  message = f'^{prefix}prompt_tokens=6 plus {prefix}new_tokens=59 exceeds the context of 64'
  with pytest.raises(UserError, match=message):
    PromptDecoder(
      loaded.model,
      loaded.params,
      prompts,
      new_tokens=59,
      confidence=decode.Confidence.MAX_PROB,
      settings_prefix=prefix,
    )


def test_prompts_are_beginnings_of_held_out_documents(corpus, prompts):
  (task,) = corpus.corpus.tasks
  tokens, offsets = task.held_out.tokens, task.held_out.offsets
  beginnings = [tokens[begin : begin + 6].tolist() for begin in offsets[:-1]]
  assert len(prompts) == 3
  assert len({tuple(prompt) for prompt in prompts}) == 3
  for prompt in prompts:
    assert prompt in beginnings
    assert prompt[0] == data.start_id(corpus.tokenizer)


def test_fewer_or_shorter_documents_give_fewer_or_shorter_prompts(corpus):
  (task,) = corpus.corpus.tasks
  sizes = np.diff(task.held_out.offsets)
  every = held_out_prompts(corpus, count=99, num_tokens=10_000)
  # Whole documents, without the id that ends them.
  assert [len(prompt) for prompt in every] == (sizes - 1).tolist()
  assert all(corpus.tokenizer.eos_id not in prompt for prompt in every)
