"""Requests are taken strictly, and every other body has a clear answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from exitax.decode import Sampler
from exitax.serve.protocol import ChatRequest, CompletionRequest, parse_request
from exitax.serve.refusals import Refusal
from exitax.serve.service import sampler_of


def completion(**fields) -> CompletionRequest:
  return parse_request(CompletionRequest, json.dumps({'prompt': 'a', **fields}).encode())


@pytest.mark.parametrize('prompt', ['a', '', ['a', 'b'], [1, 2], [[1, 2], [3]]])
def test_prompts(prompt):
  assert completion(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
  ('fields', 'model', 'expected'),
  [
    ({}, {}, Sampler(temperature=1.0)),
    ({'temperature': 0.5, 'top_k': 3}, {}, Sampler(temperature=0.5, top_k=3)),
    ({}, {'temperature': 0.6, 'top_p': 0.9}, Sampler(temperature=0.6, top_p=0.9)),
    ({'top_p': 1.0}, {'temperature': 0.6, 'top_p': 0.9}, Sampler(temperature=0.6)),
    ({'temperature': 0}, {'temperature': 0.6}, Sampler()),
    ({'temperature': 1e-9}, {}, Sampler()),
  ],
)
def test_a_request_comes_before_the_model_and_the_model_before_openai(fields, model, expected):
  assert sampler_of(completion(**fields), model) == expected


@pytest.mark.parametrize('threshold', [0, 1, 0.5, [0, 1], [0.25, 0.5]])
def test_thresholds_may_be_integers(threshold):
  assert completion(threshold=threshold).threshold == threshold


@pytest.mark.parametrize(
  ('fields', 'status', 'param', 'words'),
  [
    ({'use_early_exit': 'false'}, 422, 'use_early_exit', 'valid boolean; got false'),
    ({'use_early_exit': 0}, 422, 'use_early_exit', 'valid boolean'),
    ({'threshold': '0.5'}, 422, 'threshold', 'valid number'),
    ({'threshold': True}, 422, 'threshold', 'valid number'),
    ({'strategy': 1}, 422, 'strategy', 'valid string'),
    ({'temperature': True}, 400, 'temperature', 'valid number'),
    ({'temperature': 2.5}, 400, 'temperature', 'less than or equal to 2; got 2.5'),
    ({'temperature': float('nan')}, 400, 'temperature', 'finite'),
    ({'top_p': 0}, 400, 'top_p', 'greater than 0'),
    ({'n': 1.5}, 400, 'n', 'valid integer'),
    ({'n': 0}, 400, 'n', 'greater than or equal to 1'),
    ({'max_tokens': 0}, 400, 'max_tokens', 'greater than or equal to 1'),
    ({'seed': 2**70}, 400, 'seed', 'less than'),
    ({'stop': ''}, 400, 'stop', 'at least 1 character'),
    ({'stop': ['a'] * 17}, 400, 'stop', 'at most 16'),
    ({'stream': 'yes'}, 400, 'stream', 'valid boolean'),
    ({'presence_penalty': 1}, 400, 'presence_penalty', 'less than or equal to 0'),
    ({'logit_bias': {'5': 1}}, 400, 'logit_bias', 'at most 0 items'),
    ({'suffix': 'x'}, 400, 'suffix', 'None'),
    ({'prompt': [[1], ['a']]}, 400, 'prompt', 'valid'),
    ({'prompt': {'a': 1}}, 400, 'prompt', 'valid string'),
    ({'treshold': 1}, 400, 'treshold', 'unknown field treshold'),
    ({'stream_options': {'x': 1}}, 400, 'stream_options.x', 'unknown field'),
  ],
)
def test_refusals(fields, status: int, param: str, words: str):
  with pytest.raises(Refusal, match=words) as refused:
    completion(**fields)
  assert refused.value.status == status
  assert refused.value.param == param


@pytest.mark.parametrize(
  'body', [b'', b'{', b'[]', b'null', b'"x"', b'\xff', b'{"prompt": "\\ud800"}', b'[' * 100000]
)
def test_bodies_that_are_no_request(body: bytes):
  with pytest.raises(Refusal) as refused:
    parse_request(CompletionRequest, body)
  assert refused.value.status == 400


@pytest.mark.parametrize(
  'messages',
  [
    [],
    [{'role': 'king', 'content': 'x'}],
    [{'role': 'user'}],
    [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}],
    [{'role': 'user', 'content': None}],
    [{'role': 'assistant', 'content': 'x', 'refusal': 'no'}],
    [{'role': 'assistant', 'content': 'x', 'tool_calls': [{'id': 'a'}]}],
    'hello',
  ],
)
def test_messages_that_are_none(messages):
  with pytest.raises(Refusal) as refused:
    parse_request(ChatRequest, json.dumps({'messages': messages}).encode())
  assert refused.value.status == 400
  assert str(refused.value.param).startswith('messages')


def test_text_parts_are_joined():
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  body = json.dumps({'messages': [{'role': 'user', 'content': parts}]}).encode()
  message = parse_request(ChatRequest, body).messages[0]
  assert message.for_template() == {'role': 'user', 'content': 'ab'}


def test_an_answer_of_openais_client_goes_into_the_next_request():
  answer = ChatCompletionMessage(role='assistant', content='b', annotations=[], tool_calls=[])
  said = {**answer.model_dump(), 'audio': None, 'function_call': None, 'refusal': None}
  body = json.dumps({'messages': [{'role': 'user', 'content': 'a'}, said]}).encode()
  message = parse_request(ChatRequest, body).messages[1]
  assert message.for_template() == {'role': 'assistant', 'content': 'b'}


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=6,
)
field_names = st.sampled_from([*CompletionRequest.model_fields, *ChatRequest.model_fields, 'other'])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([CompletionRequest, ChatRequest]), st.dictionaries(field_names, json_values))
def test_any_json_is_a_request_or_a_refusal(kind, fields):
  try:
    parse_request(kind, json.dumps(fields).encode())
  except Refusal as refusal:
    assert refusal.status in (400, 422)
    json.dumps(refusal.body()).encode()
    assert refusal.message


@settings(deadline=None)
@given(st.sampled_from([CompletionRequest, ChatRequest]), st.binary(max_size=50))
def test_any_bytes_are_a_refusal(kind, body):
  with pytest.raises(Refusal):
    parse_request(kind, body)
