"""Every request gets what it would have got alone; slots come back whatever happens."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from exitax import decode
from exitax.checkpoint import LoadedModel
from exitax.decode import DeferredExit, Sampler, StopReason
from exitax.serve import ServeConfig, Service, build_service
from exitax.serve.batch import PREFIX_CHUNK, SlotBatch, window_at
from exitax.serve.jobs import Failure, Gain, Job
from exitax.serve.refusals import Refusal
from exitax.serve.strategies import DEFERRED, FULL, SPECULATIVE

EOS = 257


class Listener:
  """Collects what an engine delivers to one request."""

  def __init__(self) -> None:
    self.tokens: dict[int, list[int]] = {}
    self.layers: dict[int, list[int]] = {}
    self.reasons: dict[int, StopReason] = {}
    self.log_probs: list[float] = []
    self.cached = 0
    self.failure: Refusal | None = None

  def __call__(self, event) -> None:
    if isinstance(event, Failure):
      self.failure = event.refusal
      return
    assert isinstance(event, Gain)
    self.tokens.setdefault(event.choice, []).extend(token.token for token in event.tokens)
    self.layers.setdefault(event.choice, []).extend(token.exit_layer for token in event.tokens)
    self.log_probs += [token.log_prob for token in event.tokens]
    self.reasons[event.choice] = event.stop_reason
    self.cached = event.cached_tokens

  def finished(self, choices: int = 1) -> bool:
    return len(self.reasons) == choices and StopReason.RUNNING not in self.reasons.values()


class Clock:
  """Time that passes when told."""

  def __init__(self) -> None:
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture(scope='module')
def shared(make_service: Callable[..., Service]) -> Service:
  """A service whose turns the tests take themselves."""
  return make_service()


@pytest.fixture
def engine(shared: Service):
  yield shared.engine
  settle(shared.engine)
  assert shared.engine.occupancy().slots_used == 0


@pytest.fixture
def clock(engine, monkeypatch: pytest.MonkeyPatch) -> Clock:
  clock = Clock()
  monkeypatch.setattr(engine, '_clock', clock)
  return clock


def settle(engine, turns: int = 2000) -> None:
  for _ in range(turns):
    if not engine.turn() and engine.idle:
      return
  raise AssertionError('the engine does not come to rest')


def job(prompt=(5, 6, 7), **changes) -> Job:
  settings = {'budget': 6, 'strategy': FULL, 'thresholds': (1.0, 1.0), 'stop_tokens': (EOS,)}
  return Job(prompt=tuple(prompt), **{**settings, **changes})


def alone(loaded: LoadedModel, wanted: Job, sample: int = 0) -> decode.Completion:
  return decode.generate(
    loaded.model,
    loaded.params,
    [wanted.prompt],
    max_new_tokens=wanted.budget,
    policy=DeferredExit(threshold=wanted.thresholds),
    sampler=wanted.sampler,
    stop_tokens=wanted.stop_tokens,
    seed=[wanted.seeds[sample]],
  ).completions[0]


def random_job(rng: random.Random) -> Job:
  strategy = rng.choice([FULL, DEFERRED, SPECULATIVE])
  threshold = rng.choice([0.0, 0.3, 0.6]) if strategy == DEFERRED else 1.0
  return job(
    [rng.randrange(256) for _ in range(rng.choice([1, 2, 9, 17, 40]))],
    budget=rng.choice([1, 5, 20]),
    seeds=tuple(rng.randrange(1000) for _ in range(rng.choice([1, 1, 2]))),
    sampler=Sampler(temperature=rng.choice([0.0, 0.7, 1.2]), top_k=rng.choice([0, 20])),
    strategy=strategy,
    thresholds=(threshold, min(1.0, threshold + 0.1)),
  )


@pytest.mark.parametrize('seed', range(3))
def test_joining_and_leaving_changes_nobodys_tokens(engine, loaded: LoadedModel, seed: int):
  rng = random.Random(seed)
  jobs = [random_job(rng) for _ in range(12)]
  listeners = []
  for wanted in jobs:
    listeners.append(Listener())
    engine.submit([wanted], listeners[-1])
    for _ in range(rng.randrange(3)):
      engine.turn()
  settle(engine)
  exits = set()
  for wanted, listener in zip(jobs, listeners, strict=True):
    for sample in range(len(wanted.seeds)):
      expected = alone(loaded, wanted, sample)
      assert listener.tokens[sample] == expected.tokens.tolist()
      if wanted.strategy != SPECULATIVE:
        assert listener.layers[sample] == expected.exit_layers.tolist()
      assert listener.reasons[sample] == expected.stop_reason
      exits |= set(listener.layers[sample])
  assert exits == {1, 2, 3}


def test_speculation_gains_several_tokens_a_step(engine, loaded: LoadedModel):
  wanted, listener = job(budget=100, strategy=SPECULATIVE, stop_tokens=()), Listener()
  engine.submit([wanted], listener)
  settle(engine)
  expected = alone(loaded, wanted)
  assert listener.tokens[0] == expected.tokens.tolist()
  assert np.allclose(listener.log_probs, expected.log_probs, atol=1e-3)


def test_more_gains_than_are_read_at_once(engine, loaded: LoadedModel, monkeypatch):
  monkeypatch.setattr('exitax.serve.batch.GAIN_WIDTH', 3)
  wanted, listener = job(budget=30, stop_tokens=()), Listener()
  engine.submit([wanted], listener)
  settle(engine)
  assert listener.tokens[0] == alone(loaded, wanted).tokens.tolist()


def test_a_known_prefix_is_not_run_again_and_gives_the_same(engine, loaded: LoadedModel):
  prompt = tuple(range(100))
  first, second = Listener(), Listener()
  engine.submit([job(prompt)], first)
  settle(engine)
  engine.submit([job((*prompt[:70], 200))], second)
  settle(engine)
  assert second.cached == 64
  assert second.tokens[0] == alone(loaded, job((*prompt[:70], 200))).tokens.tolist()


def test_samples_of_one_prompt_share_its_prefill(engine, shared: Service, loaded: LoadedModel):
  before = shared.metrics.prompt_tokens._value.get()
  wanted = job(seeds=(1, 2, 3, 4, 5), sampler=Sampler(temperature=1.0))  # More than slots.
  listener = Listener()
  engine.submit([wanted], listener)
  settle(engine)
  assert shared.metrics.prompt_tokens._value.get() - before == len(wanted.prompt)
  for sample in range(5):
    assert listener.tokens[sample] == alone(loaded, wanted, sample).tokens.tolist()


def test_the_prompts_of_one_request_are_numbered(engine, loaded: LoadedModel):
  jobs = [job((i + 1,), first_choice=2 * i, seeds=(0, 1)) for i in range(2)]
  listener = Listener()
  engine.submit(jobs, listener)
  settle(engine)
  assert sorted(listener.tokens) == [0, 1, 2, 3]
  assert listener.tokens[2] == alone(loaded, jobs[1]).tokens.tolist()


def test_a_long_prompt_does_not_stall_running_rows(engine):
  running, long = Listener(), Listener()
  engine.submit([job(budget=200, stop_tokens=())], running)
  engine.turn()
  engine.submit([job(range(200))], long)
  for _ in range(2):
    before = len(running.tokens[0])
    engine.turn()
    assert len(running.tokens[0]) > before


def test_nothing_compiles_after_the_start(shared: Service, engine):
  compiled = []

  def listen(name: str, seconds: float, **_) -> None:
    if 'backend_compile' in name:
      compiled.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    rng = random.Random(7)
    for length in (1, 2, 33, 150, 200):
      engine.submit([dataclasses.replace(random_job(rng), prompt=(9,) * length)], Listener())
      engine.turn()
    ticket = engine.submit([job()], Listener())
    engine.turn()
    ticket.cancel()
    settle(engine)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled == []


def test_cancelling_frees_the_slot_before_the_next_step(engine):
  listener = Listener()
  ticket = engine.submit([job(budget=200, seeds=(1, 2), stop_tokens=())], listener)
  engine.turn()
  assert engine.occupancy().slots_used == 2
  ticket.cancel()
  engine.turn()
  assert engine.occupancy().slots_used == 0
  assert not listener.finished(2)


def test_a_stopped_choice_leaves_the_others(engine):
  listener = Listener()
  ticket = engine.submit([job(budget=60, seeds=(1, 2), stop_tokens=())], listener)
  engine.turn()
  ticket.stop(0)
  engine.turn()
  assert engine.occupancy().slots_used == 1
  settle(engine)
  assert len(listener.tokens[1]) == 60


def test_columns_in_use_are_counted(engine):
  engine.submit([job(budget=200, stop_tokens=())], Listener())
  engine.turn()
  used = engine.occupancy().columns_used
  assert 3 < used <= engine.occupancy().columns
  engine.turn()
  assert engine.occupancy().columns_used > used


def test_a_full_queue_is_refused_whole(engine):
  for _ in range(11):  # 3 slots, 8 waiting.
    engine.submit([job()], Listener())
  with pytest.raises(Refusal) as refused:
    engine.submit([job(), job()], Listener())
  assert refused.value.status == 429
  assert refused.value.retry_after


def test_who_waits_too_long_is_refused(engine, clock: Clock):
  running = [Listener() for _ in range(3)]
  for listener in running:
    engine.submit([job(budget=200, stop_tokens=())], listener)
    engine.turn()
  held, waiting = Listener(), Listener()
  engine.submit([job()], held)
  engine.turn()  # Is prefilled and waits for a slot.
  engine.submit([job()], waiting)
  clock.now = 31.0
  engine.turn()
  assert waiting.failure.status == 503
  assert waiting.failure.code == 'queue_timeout'
  assert held.failure is None


def test_who_runs_too_long_is_refused(engine, clock: Clock):
  listener = Listener()
  engine.submit([job(budget=200, stop_tokens=())], listener)
  engine.turn()
  clock.now = 301.0
  engine.turn()
  assert listener.failure.code == 'request_timeout'
  assert engine.occupancy().slots_used == 0


def test_a_fault_refuses_what_ran_and_the_engine_goes_on(
  make_service: Callable[..., Service], loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog
):
  service = make_service()
  engine, broken = service.engine, Listener()

  def fault(*_, **__):
    raise RuntimeError('out of memory')

  with monkeypatch.context() as patch:
    patch.setattr(engine._batch, 'run', fault)
    engine.start()
    engine.submit([job()], broken)
    wait_for(lambda: broken.failure)
  assert broken.failure.code == 'engine_failed'
  assert 'out of memory' in caplog.text
  listener = Listener()
  engine.submit([job()], listener)
  wait_for(listener.finished)
  assert listener.tokens[0] == alone(loaded, job()).tokens.tolist()
  engine.stop()


def test_an_engine_that_cannot_start_anew_says_so(
  make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
):
  engine, broken = make_service().engine, Listener()

  def fault(*_, **__):
    raise RuntimeError('out of memory')

  monkeypatch.setattr(engine._batch, 'run', fault)
  monkeypatch.setattr(engine._batch, 'reset', fault)
  engine.start()
  engine.submit([job()], broken)
  wait_for(lambda: engine.draining)
  assert broken.failure.code == 'engine_failed'
  with pytest.raises(Refusal, match='restart it') as refused:
    engine.submit([job()], Listener())
  assert refused.value.status == 503
  engine.stop()


def test_a_draining_engine_finishes_and_takes_nothing_new(make_service: Callable[..., Service]):
  engine = make_service().engine
  listener = Listener()
  engine.submit([job()], listener)
  engine.drain()
  with pytest.raises(Refusal) as refused:
    engine.submit([job()], Listener())
  assert refused.value.status == 503
  settle(engine)
  assert listener.finished()


def test_stopping_refuses_what_still_runs(make_service: Callable[..., Service]):
  engine = make_service().engine
  engine.start()
  listener = Listener()
  engine.submit([job(budget=200, stop_tokens=())], listener)
  engine.stop()
  assert listener.failure.code == 'draining' or len(listener.tokens[0]) == 200


def test_thresholds_of_one_never_exit(engine, loaded: LoadedModel):
  listener = Listener()
  engine.submit([job(budget=20, stop_tokens=())], listener)
  settle(engine)
  full = decode.generate(loaded.model, loaded.params, [job().prompt], max_new_tokens=20)
  assert listener.tokens[0] == full.tokens[0]
  assert set(listener.layers[0]) == {3}


def wait_for(condition, seconds: float = 20.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_windows_of_a_prompt_stay_within_the_columns():
  for columns in (16, 48, 112, 272):
    for length in range(1, columns):
      for start in range(0, length, 32):
        filled = start
        while filled < length:
          width = window_at(filled, length - filled, columns=columns)
          assert filled % width == 0
          assert filled + width <= columns
          filled += min(width, length - filled)


def test_the_smallest_slots_hold_a_whole_chunk_of_a_prefix(loaded: LoadedModel):
  plans = (decode.FullDepth().plan(loaded.model.config),)
  batch = SlotBatch(
    loaded.model, loaded.params, plans=plans, num_slots=1, capacity=2, prefix_bytes=0
  )
  chunk = decode.read_chunk(batch._state, np.int32(0), chunk=PREFIX_CHUNK)
  assert chunk.layers[0].key.shape[2] == PREFIX_CHUNK


def test_a_model_without_exits_is_served(make_model: Callable[..., LoadedModel]):
  plain = make_model(exits=())
  service = build_service(plain, ServeConfig(num_slots=2))
  listener = Listener()
  wanted = job(thresholds=())
  service.engine.submit([wanted], listener)
  settle(service.engine)
  full = decode.generate(plain.model, plain.params, [wanted.prompt], max_new_tokens=6)
  assert listener.tokens[0] == full.tokens[0]
  assert np.all(np.asarray(listener.layers[0]) == 3)
