"""The server on a real port: OpenAI's own client, streams, refusals, clients that vanish."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from exitax.serve import Service

NONE = types.SimpleNamespace(content=[])
STATUSES_OF_BAD_REQUESTS = {400, 404, 405, 413, 422}


@pytest.fixture(scope='module')
def client(served) -> Iterator[openai.OpenAI]:
  with openai.OpenAI(base_url=f'{served.url}/v1', api_key='any', max_retries=0) as client:
    yield client


@pytest.fixture(scope='module')
def http(served) -> Iterator[httpx.Client]:
  with httpx.Client(base_url=served.url, timeout=30) as client:
    yield client


def complete(http: httpx.Client, **fields) -> httpx.Response:
  body = {'prompt': 'ab', 'max_tokens': 6, 'temperature': 0, **fields}
  return http.post('/v1/completions', json=body)


# OpenAI's client.


def test_completion(client: openai.OpenAI):
  answer = client.completions.create(
    model='tiny', prompt='def', max_tokens=8, temperature=0, extra_body={'ignore_eos': True}
  )
  choice = answer.choices[0]
  assert answer.object == 'text_completion'
  assert answer.model == 'tiny'
  assert choice.finish_reason == 'length'
  assert answer.usage.prompt_tokens == 4
  assert answer.usage.completion_tokens == 8
  assert len(choice.exit_layers) == len(choice.confidences) == len(choice.pieces) == 8
  assert ''.join(choice.pieces) == choice.text
  assert 1 <= answer.usage.effective_layers <= 3


def test_log_probabilities(client: openai.OpenAI, http: httpx.Client):
  settings = {
    'model': 'tiny',
    'max_tokens': 6,
    'temperature': 0,
    'extra_body': {'ignore_eos': True},
  }
  found = client.completions.create(**settings, prompt='q', logprobs=3).choices[0].logprobs
  assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 6
  assert all(len(top) <= 3 for top in found.top_logprobs)
  for value, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
    assert value == max(top.values()) < 0  # Greedy.
  messages = [{'role': 'user', 'content': 'q'}]
  chat = client.chat.completions.create(
    **settings, messages=messages, logprobs=True, top_logprobs=2, stream=True
  )
  tokens = [t for c in chat for t in (c.choices[0].logprobs or NONE).content]
  assert len(tokens) == 6
  assert all(len(token.top_logprobs) == 2 for token in tokens)
  assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)
  assert complete(http, logprobs=0).json()['choices'][0]['logprobs']['top_logprobs'] is None
  assert complete(http, logprobs=6).json()['error']['param'] == 'logprobs'
  assert complete(http, logprobs=1, echo=True).status_code == 400


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI):
  settings = {'model': 'tiny', 'prompt': 'x', 'max_tokens': 20, 'seed': 5, 'n': 2, 'echo': True}
  extra = {'threshold': 0.3}
  whole = client.completions.create(**settings, extra_body=extra)
  texts, layers, reasons = ['', ''], [[], []], [None, None]
  usage = None
  for chunk in client.completions.create(
    **settings, stream=True, stream_options={'include_usage': True}, extra_body=extra
  ):
    usage = chunk.usage or usage
    for choice in chunk.choices:
      texts[choice.index] += choice.text
      layers[choice.index] += choice.exit_layers
      reasons[choice.index] = choice.finish_reason or reasons[choice.index]
  assert texts == [choice.text for choice in whole.choices]
  assert all(text.startswith('x') for text in texts)
  assert texts[0] != texts[1]
  assert layers == [choice.exit_layers for choice in whole.choices]
  assert reasons == [choice.finish_reason for choice in whole.choices]
  assert usage.completion_tokens == whole.usage.completion_tokens
  assert 1 <= usage.effective_layers < 3


def test_chat(client: openai.OpenAI):
  messages = [{'role': 'system', 'content': 'Be brief'}, {'role': 'user', 'content': 'Hi'}]
  answer = client.chat.completions.create(
    model='tiny', messages=messages, max_completion_tokens=10, temperature=0
  )
  assert answer.choices[0].message.role == 'assistant'
  assert answer.usage.prompt_tokens == 1 + len('System: Be brief\nUser: Hi\nAssistant:')
  stream = client.chat.completions.create(
    model='tiny', messages=messages, max_tokens=10, temperature=0, stream=True
  )
  chunks = [chunk.choices[0] for chunk in stream]
  assert chunks[0].delta.role == 'assistant'
  text = ''.join(chunk.delta.content or '' for chunk in chunks)
  assert text == answer.choices[0].message.content
  assert chunks[-1].finish_reason == answer.choices[0].finish_reason
  assert [x for chunk in chunks for x in chunk.exit_layers] == answer.choices[0].exit_layers


def test_models(client: openai.OpenAI):
  (model,) = client.models.list().data
  assert model.id == 'tiny'
  assert client.models.retrieve('tiny').layers == [1, 2, 3]
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('other')
  with pytest.raises(openai.NotFoundError):
    client.completions.create(model='other', prompt='a')


def test_refusals_reach_the_client_as_its_own_errors(client: openai.OpenAI):
  with pytest.raises(openai.UnprocessableEntityError, match='outside'):
    client.completions.create(model='tiny', prompt='a', extra_body={'threshold': 2})
  with pytest.raises(openai.BadRequestError, match='exceed the context of 256'):
    client.completions.create(model='tiny', prompt='a' * 250, max_tokens=10)


# Fields.


def test_prompts_as_text_and_as_ids(http: httpx.Client):
  as_text = complete(http, prompt='ab').json()['choices']
  as_ids = complete(http, prompt=[256, 97, 98]).json()['choices']
  several = complete(http, prompt=['ab', 'c']).json()['choices']
  ids = complete(http, prompt=[[256, 97, 98], [256, 99]], echo=True).json()['choices']
  assert as_ids == as_text
  assert several[0] == as_text[0]
  assert [choice['index'] for choice in several] == [0, 1]
  assert [choice['text'] for choice in ids] == [
    'ab' + several[0]['text'],
    'c' + several[1]['text'],
  ]


def test_a_seed_gives_the_same_text_again(http: httpx.Client):
  texts = [
    complete(http, temperature=1, seed=seed).json()['choices'][0]['text'] for seed in (1, 1, 2)
  ]
  assert texts[0] == texts[1] != texts[2]


def test_stop_strings_end_the_text_before_them(http: httpx.Client, served):
  fields = {'max_tokens': 60, 'temperature': 1, 'seed': 3, 'ignore_eos': True}
  full = complete(http, **fields).json()['choices'][0]['text']
  stop = full[5:8]
  choice = complete(http, **fields, stop=['never to be seen', stop]).json()['choices'][0]
  assert choice['text'] == full[: full.index(stop)]
  assert choice['finish_reason'] == 'stop'
  assert ''.join(choice['pieces']) == choice['text']
  assert served.wait_idle()


def test_use_early_exit_false_means_false(http: httpx.Client):
  answer = complete(http, use_early_exit=False).json()
  assert set(answer['choices'][0]['exit_layers']) == {3}
  assert set(complete(http, threshold=0).json()['choices'][0]['exit_layers']) == {1}
  assert complete(http, use_early_exit='false').status_code == 422


def test_the_prefix_cache_is_told_of(http: httpx.Client):
  prompt = 'z' * 100
  for expected in (0, 96):
    usage = complete(http, prompt=prompt).json()['usage']
    assert usage['prompt_tokens_details']['cached_tokens'] == expected


def test_health_and_metrics(http: httpx.Client):
  assert http.get('/health').json() == {'status': 'ok', 'model': 'tiny'}
  complete(http, threshold=0)
  text = http.get('/metrics').text
  for name in (
    'exitax_requests_total{endpoint="/v1/completions",status="200"}',
    'exitax_exit_tokens_total{layers="1"}',
    'exitax_time_to_first_token_seconds_count',
    'exitax_time_per_token_seconds_bucket',
    'exitax_slots 3.0',
    'exitax_columns_used 0.0',
    'exitax_waiting 0.0',
    'exitax_prefix_cache_hit_tokens_total',
  ):
    assert name in text


# Trouble.


def malformed(rng: random.Random) -> tuple[str, bytes]:
  """A path and a body that no client should send."""
  good = {'prompt': 'a', 'max_tokens': 1, 'messages': [{'role': 'user', 'content': 'a'}]}
  wrong = rng.choice(
    [None, 'x', -1, 1e400, [], {}, [[]], True, '\ud800', 2**80, float('nan'), ['a', 1]]
  )
  names = ['prompt', 'max_tokens', 'n', 'stop', 'seed', 'temperature', 'top_p', 'top_k']
  names += ['threshold', 'strategy', 'use_early_exit', 'confidence', 'stream_options', 'nonsense']
  body = json.dumps({'prompt': good['prompt'], rng.choice(names): wrong})
  kind = rng.randrange(5)
  if kind == 0:
    body = body[: rng.randrange(len(body))]
  elif kind == 1:
    return '/v1/completions', rng.randbytes(40)
  elif kind == 2:
    body = json.dumps({'messages': wrong, 'max_tokens': 1})
  return rng.choice(['/v1/completions', '/v1/chat/completions', '/v1/nothing']), body.encode()


def test_malformed_requests_leave_it_answering(http: httpx.Client, served):
  rng = random.Random(0)
  statuses = set()
  for _ in range(300):
    path, body = malformed(rng)
    statuses.add(http.post(path, content=body).status_code)
  # A few of them are requests after all, such as stop=null.
  assert statuses <= STATUSES_OF_BAD_REQUESTS | {200}
  assert {400, 404, 422} <= statuses
  assert complete(http).status_code == 200
  assert served.wait_idle()


@pytest.mark.parametrize(
  'raw',
  [
    b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
    b'GET / FTP/1.1\r\n\r\n',
    b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n',
    b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{"prompt"',
    b'GET ' + b'a' * 100000,
  ],
)
def test_bytes_that_are_not_http(raw: bytes, served, http: httpx.Client):
  """Not even a body that ends early counts as an error of the server's."""
  host, _, port = served.url.removeprefix('http://').partition(':')
  with socket.create_connection((host, int(port)), timeout=5) as connection:
    connection.sendall(raw)
    connection.shutdown(socket.SHUT_WR)
    reply = connection.recv(1000)
  assert not reply or reply.split()[1].startswith(b'4')
  assert http.get('/health').status_code == 200
  assert 'status="5' not in http.get('/metrics').text


def test_a_body_that_is_too_large(http: httpx.Client):
  answer = complete(http, prompt='a' * (5 << 20))
  assert answer.status_code == 413
  assert answer.json()['error']['code'] == 'body_too_large'


def test_unknown_paths_and_methods(http: httpx.Client):
  assert http.get('/nothing').json()['error']['message'] == 'GET /nothing: Not Found'
  assert http.get('/v1/completions').status_code == 405
  assert http.get('/health', headers={'host': 'evil.example'}).status_code == 421


@pytest.mark.parametrize('stream', [True, False])
def test_killed_clients_leak_no_slot(served, stream: bool):
  body = json.dumps(
    {'prompt': 'a', 'max_tokens': 250, 'stream': stream, 'ignore_eos': True, 'n': 2}
  ).encode()
  head = f'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n'
  host, _, port = served.url.removeprefix('http://').partition(':')
  cancelled = served.service.metrics.cancelled._value
  before = cancelled.get()
  for _ in range(5):
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(head.encode() + body)
    if stream:
      assert connection.recv(100)
    else:
      while served.service.engine.idle:
        time.sleep(0.001)
    connection.close()
  assert served.wait_idle()
  assert served.service.engine.occupancy().slots_used == 0
  assert cancelled.get() > before


def test_a_full_queue_answers_429_and_recovers(served, http: httpx.Client):
  prompts = ['a'] * 11  # As many as slots and queue hold.
  long = {'prompt': 'a', 'max_tokens': 250, 'stream': True, 'ignore_eos': True}
  with http.stream('POST', '/v1/completions', json=long) as running:
    next(running.iter_lines())
    refused = complete(http, prompt=prompts)
  assert refused.status_code == 429
  assert refused.headers['retry-after'] == '1'
  assert refused.json()['error']['type'] == 'rate_limit_error'
  assert served.wait_idle()
  assert complete(http, prompt=prompts).status_code == 200
  assert served.wait_idle()


def test_waiting_too_long_answers_503(make_service: Callable[..., Service], serving):
  with (
    serving(make_service(num_slots=1, queue_timeout=0.05)) as served,
    httpx.Client(base_url=served.url, timeout=30) as http,
  ):
    statuses = []

    def ask() -> None:
      fields = {'max_tokens': 250, 'ignore_eos': True, 'n': 3, 'stream': True}
      statuses.append(complete(http, **fields).status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert set(statuses) == {200, 503}
    assert served.wait_idle()


def test_a_deadline_in_a_stream_is_its_last_event(make_service: Callable[..., Service], serving):
  with (
    serving(make_service(request_timeout=0.1)) as served,
    httpx.Client(base_url=served.url, timeout=30) as http,
  ):
    lines = complete(http, max_tokens=250, ignore_eos=True, stream=True, n=8).text.split('\n\n')
    error = json.loads(lines[-3].removeprefix('data: '))['error']
    assert error['code'] == 'request_timeout'
    assert lines[-2] == 'data: [DONE]'
    assert served.wait_idle()


def test_a_key_guards_the_model_and_not_the_health(make_service: Callable[..., Service], serving):
  with (
    serving(make_service(), api_key='sesame') as served,
    httpx.Client(base_url=served.url, timeout=30) as http,
  ):
    assert complete(http).status_code == 401
    assert complete(http).headers['www-authenticate'] == 'Bearer'
    assert http.get('/metrics').status_code == 401
    assert http.get('/health').status_code == 200
    http.headers['authorization'] = 'Bearer sesame'
    assert complete(http).status_code == 200


def test_a_draining_server_finishes_streams_and_refuses_new_requests(
  make_service: Callable[..., Service], serving
):
  with (
    serving(make_service()) as served,
    httpx.Client(base_url=served.url, timeout=30) as http,
    httpx.stream(
      'POST',
      f'{served.url}/v1/completions',
      json={'prompt': 'a', 'max_tokens': 200, 'ignore_eos': True, 'stream': True},
      timeout=30,
    ) as stream,
  ):
    lines = stream.iter_lines()
    next(lines)
    served.service.engine.drain()
    assert http.get('/health').status_code == 503
    refused = complete(http)
    assert refused.status_code == 503
    assert refused.json()['error']['code'] == 'draining'
    assert list(lines)[-2] == 'data: [DONE]'
