"""Thinkers on the server: every group writes what it would write alone, whoever else is served."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence

import pytest
from fastapi.testclient import TestClient

from exitax import decode
from exitax.checkpoint import LoadedModel
from exitax.data import encode_prompt
from exitax.decode import DeferredExit, GroupRun, Sampler, Sees, Spare, StopReason
from exitax.errors import UserError
from exitax.serve import Service, create_app
from exitax.serve.engine import Engine
from exitax.serve.jobs import Job, Together
from exitax.serve.protocol import CompletionRequest
from exitax.serve.strategies import DEFERRED, FULL, SPECULATIVE
from tests.serve.test_engine import EOS, Clock, Listener, alone, settle


@pytest.fixture(scope='module')
def service(make_service: Callable[..., Service]) -> Service:
  """Four slots; turns are the tests' to take, unless a client's."""
  return make_service(num_slots=4)


@pytest.fixture
def engine(service: Service):
  yield service.engine
  settle(service.engine)
  assert service.engine.occupancy().slots_used == 0


def random_job(rng: random.Random) -> Job:
  together = None
  if rng.random() < 0.6:
    size = rng.choice([1, 2, 4])  # Few shapes: the oracle compiles each.
    together = Together(
      headers=tuple(
        tuple(rng.randrange(256) for _ in range(rng.choice([0, 1, 3]))) for _ in range(size)
      ),
      sees=Sees.parse(rng.choice(['full', 'interleaved', 'strict', 'lag:3', 'none'])),
      answer=rng.choice([(), (61,), (61, 62)]),
      answer_budget=rng.choice([0, 0, 4]),
    )
  strategy = rng.choice([FULL, DEFERRED, *([] if together else [SPECULATIVE])])
  threshold = rng.choice([0.0, 0.3, 0.6]) if strategy == DEFERRED else 1.0
  return Job(
    prompt=tuple(rng.randrange(256) for _ in range(rng.choice([1, 17]))),
    together=together,
    budget=rng.choice([1, 5, 20]),
    seeds=(rng.randrange(1000),),
    sampler=Sampler(temperature=rng.choice([0.0, 0.7, 1.2]), top_k=rng.choice([0, 20])),
    strategy=strategy,
    thresholds=(threshold, min(1.0, threshold + 0.1)),
    stop_tokens=(EOS,),
  )


def alone_together(loaded: LoadedModel, job: Job) -> Sequence[decode.Completion]:
  """What the job's choices are without a server."""
  together = job.together
  if together is None:
    return [alone(loaded, job)]
  common = {'sampler': job.sampler, 'seed': job.seeds[0]}
  thinkers = [decode.Thinker(header=header, **common) for header in together.headers]
  answer = together.answer or job.prompt[-1:]
  run = GroupRun(
    loaded.model,
    loaded.params,
    [decode.Group(prompt=job.prompt, thinkers=thinkers, sees=together.sees)],
    decode.ThinkConfig(max_new_tokens=job.budget, slot_width=together.slot_width(job.budget)),
    policy=DeferredExit(threshold=job.thresholds),
    stop_tokens=job.stop_tokens,
    spare=Spare(texts=1, tokens=len(answer) + 8),
  )
  found = list(run.finish()[0])
  if together.answer_budget:
    writer = decode.Thinker(
      header=answer,
      max_new_tokens=together.answer_budget,
      number=together.size,
      slot=together.size,
      **common,
    )
    run.start(together.size, 0, writer, sees_all=True)
    found.append(run.advance(together.answer_budget + len(answer) + 1)[together.size])
  return found


@pytest.mark.parametrize('seed', range(3))
def test_groups_and_single_requests_share_slots_and_change_nobodys_tokens(
  engine: Engine, loaded: LoadedModel, seed: int
):
  rng = random.Random(seed)
  jobs = [random_job(rng) for _ in range(10)]
  listeners = []
  for wanted in jobs:
    listeners.append(Listener())
    engine.submit([wanted], listeners[-1])
    for _ in range(rng.randrange(3)):
      engine.turn()
  settle(engine)
  for wanted, listener in zip(jobs, listeners, strict=True):
    assert listener.finished(wanted.num_choices)
    for choice, expected in enumerate(alone_together(loaded, wanted)):
      assert listener.tokens[choice] == expected.tokens.tolist()
      assert listener.reasons[choice] == expected.stop_reason
      if wanted.strategy != SPECULATIVE:
        assert listener.layers[choice] == expected.exit_layers.tolist()


def test_a_group_and_single_requests_are_one_step(
  engine: Engine, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
):
  runs = []
  run = engine._batch.run

  def recorded(plan, num_steps, slots, *, groups=False):
    runs.append((sorted(slots), groups))
    run(plan, num_steps, slots, groups=groups)

  monkeypatch.setattr(engine._batch, 'run', recorded)
  common = {
    'prompt': (5, 6, 7),
    'budget': 12,
    'strategy': FULL,
    'thresholds': (1.0, 1.0),
  }
  single, group = Listener(), Listener()
  engine.submit([Job(**common)], single)
  while not single.tokens:
    engine.turn()
  engine.submit([Job(**common, together=Together(headers=((1,), (2,), (3,))))], group)
  settle(engine)
  assert runs[0] == ([0], False)
  assert ([0, 1, 2, 3], True) in runs
  assert single.tokens[0] == alone(loaded, Job(**common)).tokens.tolist()


@pytest.mark.parametrize('answer_budget', [0, 3])
def test_a_thinker_can_be_stopped_and_the_others_see_what_it_wrote(
  engine: Engine, answer_budget: int
):
  together = Together(headers=((1,), (2,)), answer=(61,), answer_budget=answer_budget)
  wanted = Job(prompt=(5, 6, 7), together=together, budget=40, strategy=FULL, thresholds=(1.0, 1.0))
  listener = Listener()
  ticket = engine.submit([wanted], listener)
  while not listener.tokens.get(0):
    engine.turn()
  ticket.stop(0)
  settle(engine)
  assert len(listener.tokens[0]) < 40
  assert len(listener.tokens[1]) == 40
  assert len(listener.tokens.get(2, ())) == answer_budget
  assert listener.reasons[1] is StopReason.BUDGET


def test_a_group_that_nobody_waits_for_frees_its_slots(engine: Engine):
  together = Together(headers=((1,), (2,), (3,), (4,)), answer=(61,), answer_budget=3)
  wanted = Job(prompt=(5, 6, 7), together=together, budget=30, strategy=FULL, thresholds=(1.0, 1.0))
  listener = Listener()
  ticket = engine.submit([wanted], listener)
  while not listener.tokens:
    engine.turn()
  assert engine.occupancy().slots_used == 4
  ticket.cancel()
  engine.turn()
  assert engine.occupancy().slots_used == 0


def test_a_group_that_never_finds_its_slots_is_refused_in_time(
  engine: Engine, monkeypatch: pytest.MonkeyPatch
):
  clock = Clock()
  monkeypatch.setattr(engine, '_clock', clock)
  common = {'prompt': (5, 6, 7), 'strategy': FULL, 'thresholds': (1.0, 1.0)}
  single, group, behind = Listener(), Listener(), Listener()
  ticket = engine.submit([Job(**common, budget=200)], single)
  engine.turn()
  engine.submit([Job(**common, budget=4, together=Together(headers=((1,),) * 4))], group)
  engine.turn()
  engine.turn()
  clock.now = 31.0
  engine.submit([Job(**common, budget=4)], behind)
  engine.turn()
  assert group.failure.status == 503 and '4 slots were not free at once' in group.failure.message
  while not behind.finished():
    engine.turn()
  assert not single.finished()
  ticket.cancel()


def test_what_ended_is_not_read_again(engine: Engine, monkeypatch: pytest.MonkeyPatch):
  common = {'prompt': (5, 6, 7), 'strategy': FULL, 'thresholds': (1.0, 1.0)}
  long, short = Listener(), Listener()
  engine.submit([Job(**common, budget=120)], long)
  settle(engine)
  reads = []
  gains = engine._batch.gains
  monkeypatch.setattr(engine._batch, 'gains', lambda seen: reads.append(gains(seen)) or reads[-1])
  together = Together(headers=((1,), (2,)))
  engine.submit([Job(**common, budget=4, together=together)], short)
  settle(engine)
  assert reads and all(len(parts) == 1 for parts in reads)


def test_jobs_that_no_row_holds_are_refused(engine: Engine):
  wanted = Job(prompt=(5,), budget=1, strategy=FULL, together=Together(headers=((1,),) * 5))
  with pytest.raises(ValueError, match='more than 4 thinkers'):
    engine.submit([wanted], Listener())
  wanted = dataclasses.replace(wanted, budget=100, together=Together(headers=((1,),) * 3))
  with pytest.raises(ValueError, match='256 tokens of a row'):
    engine.submit([wanted], Listener())


@pytest.fixture(scope='module')
def client(service: Service):
  """A client of an engine that works by itself."""
  engine = service.engine
  engine.start()
  app = create_app(service, host='127.0.0.1', api_key=None)
  with TestClient(app, base_url='http://127.0.0.1') as client:
    yield client
  engine.stop()


def ask(client: TestClient, path: str = 'completions', **fields) -> dict:
  answer = client.post(f'/v1/{path}', json={'temperature': 0, 'max_tokens': 6, **fields})
  assert answer.status_code == 200, answer.text
  return answer.json()


def test_a_completion_has_a_choice_per_thinker_and_an_answer(
  client: TestClient, loaded: LoadedModel
):
  answer = ask(client, prompt='ab', thinkers=3, answer_tokens=4, visibility='strict')
  choices = answer['choices']
  assert [choice['index'] for choice in choices] == [0, 1, 2, 3]
  assert [choice['thinker'] for choice in choices] == [1, 2, 3, None]
  encode = loaded.tokenizer.encode
  prompt = tuple(encode_prompt(loaded.tokenizer, '3:ab'))
  expected = alone_together(
    loaded,
    Job(
      prompt=prompt,
      together=Together(
        headers=tuple(tuple(encode(f'|{number}')) for number in (1, 2, 3)),
        sees=Sees.parse('strict'),
        answer=tuple(encode('=')),
        answer_budget=4,
      ),
      budget=6,
      sampler=Sampler(temperature=0.0),
      strategy=FULL,
      thresholds=(1.0, 1.0),
      stop_tokens=tuple(loaded.tokenizer.stop_ids),
    ),
  )
  assert [choice['exit_layers'] for choice in choices] == [
    item.exit_layers.tolist()[: len(choice['exit_layers'])]
    for item, choice in zip(expected, choices, strict=True)
  ]
  assert answer['usage']['completion_tokens'] == sum(len(item.tokens) for item in expected)
  assert answer['usage']['prompt_tokens'] == len(prompt) + 3 * len('|1')


def test_one_thinker_alone_is_an_ordinary_text_behind_its_header(
  client: TestClient, service: Service, loaded: LoadedModel
):
  (alone,) = ask(client, prompt='ab', thinkers=1)['choices']
  ids = encode_prompt(loaded.tokenizer, '1:ab|1')
  (plain,) = ask(client, prompt=ids)['choices']
  assert alone['thinker'] == 1 and 'thinker' not in plain
  assert alone['text'] == plain['text']
  request = CompletionRequest(prompt='ab', thinkers=1)
  assert service.completion(request).jobs[0].strategy == SPECULATIVE


def test_a_template_with_the_problem_in_a_header_is_refused(
  make_service: Callable[..., Service], tmp_path
):
  path = tmp_path / 'think.toml'
  path.write_text('prompt = "{problem}"\nheader = "{problem}|"\nanswer = "="\n')
  with pytest.raises(UserError, match=r'header has \{problem\}'):
    make_service(think_template=str(path))


def test_a_stream_tells_whose_each_part_is(client: TestClient):
  whole = ask(client, prompt='ab', thinkers=2, answer_tokens=4)
  fields = {'temperature': 0, 'max_tokens': 6, 'prompt': 'ab', 'thinkers': 2, 'answer_tokens': 4}
  texts: dict[int | None, str] = {}
  with client.stream('POST', '/v1/completions', json={**fields, 'stream': True}) as answer:
    for line in answer.iter_lines():
      if line.startswith('data: {'):
        for choice in json.loads(line[6:])['choices']:
          texts[choice['thinker']] = texts.get(choice['thinker'], '') + choice['text']
  assert texts == {choice['thinker']: choice['text'] for choice in whole['choices']}


def test_thinkers_of_a_chat_are_told_inside_its_last_message(
  client: TestClient, loaded: LoadedModel
):
  messages = [{'role': 'user', 'content': 'ab'}]
  chat = ask(client, 'chat/completions', messages=messages, thinkers=2)
  # A prompt of ids is taken as it is.
  ids = encode_prompt(loaded.tokenizer, 'User: 2:ab\nAssistant:')
  plain = ask(client, prompt=ids, thinkers=2)
  assert [choice['message']['content'] for choice in chat['choices']] == [
    choice['text'] for choice in plain['choices']
  ]


def test_chats_with_thinkers_and_no_limit_take_what_the_context_has(client: TestClient):
  messages = [{'role': 'user', 'content': 'ab'}]
  chat = ask(
    client,
    'chat/completions',
    messages=messages,
    thinkers=3,
    answer_tokens=5,
    max_tokens=None,
    ignore_eos=True,
    stop=None,
  )
  prompt = chat['usage']['prompt_tokens'] - 3 * 2  # Without headers.
  room = (256 - prompt - 6) // 3 - 2
  assert chat['usage']['completion_tokens'] == 3 * room + 5


@pytest.mark.parametrize(
  ('fields', 'status', 'message'),
  [
    ({'thinkers': 5}, 400, 'thinkers=5 are more than this server takes, 4'),
    ({'thinkers': 0}, 400, 'thinkers: '),
    ({'thinkers': 2, 'n': 2}, 400, 'n=2 with thinkers'),
    ({'thinkers': 2, 'echo': True}, 400, 'echo with thinkers'),
    ({'thinkers': 2, 'visibility': 'some'}, 400, "visibility='some' is not known"),
    ({'visibility': 'full'}, 400, 'visibility does nothing without thinkers'),
    ({'answer_tokens': 3}, 400, 'answer_tokens does nothing without thinkers'),
    ({'thinkers': 2, 'strategy': 'speculative'}, 422, 'with thinkers choose'),
    ({'thinkers': 2, 'threshold': 'certified'}, 422, 'certificates speak of single texts'),
    ({'thinkers': 2, 'visibility': 'lag:' + '9' * 5000}, 400, 'visibility: '),
    ({'thinkers': 4, 'prompt': ['a'] * 40}, 400, '40 prompts with thinkers=4'),
    ({'thinkers': 2, 'answer_tokens': 300}, 400, 'lower thinkers or answer_tokens'),
    ({'thinkers': 4, 'max_tokens': 80}, 400, 'ask for at most 60 of each'),
  ],
)
def test_what_cannot_be_thought_is_refused(client: TestClient, fields, status: int, message: str):
  answer = client.post('/v1/completions', json={'prompt': 'ab', **fields})
  assert answer.status_code == status
  assert message in answer.json()['error']['message']


def test_a_server_may_take_no_thinkers(make_service: Callable[..., Service]):
  service = make_service(num_slots=1)
  assert service.max_thinkers == 1
  app = create_app(service, host='127.0.0.1', api_key=None)
  with TestClient(app, base_url='http://127.0.0.1') as client:
    for thinkers in (1, 2):
      answer = client.post('/v1/completions', json={'prompt': 'ab', 'thinkers': thinkers})
      assert answer.status_code == 400
      assert f'thinkers={thinkers} are not taken here' in answer.json()['error']['message']
