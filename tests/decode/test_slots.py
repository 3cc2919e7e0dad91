"""Slots: rows join and leave a state, and chunks of caches move between states."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from exitax import decode
from exitax.decode.state import NO_TOKEN
from exitax.layers import HeadKind

COLUMNS = 64
POLICY = decode.DeferredExit(threshold=0.6, num_top=2)


def requests(rows: int, *, budget: int = 8) -> decode.Requests:
  return decode.Requests(
    seed=np.zeros(rows, np.uint32),
    temperature=np.zeros(rows, np.float32),
    top_k=np.zeros(rows, np.int32),
    top_p=np.ones(rows, np.float32),
    min_p=np.zeros(rows, np.float32),
    stop_tokens=np.full((rows, 1), NO_TOKEN, np.int32),
    budget=np.full(rows, budget, np.int32),
    thresholds=np.full((rows, 2), 0.6, np.float32),
  )


class Decoding:
  """A model with slots for three rows."""

  def __init__(self, tiny, head: HeadKind) -> None:
    self.model, params = tiny(head)
    self.params = decode.prepare_params(self.model, params)
    self.plan = POLICY.plan(self.model.config)
    self.state = self.empty(3)

  def empty(self, rows: int, prompt=()) -> decode.DecodeState:
    tokens = np.zeros((rows, COLUMNS), np.int32)
    tokens[:, : len(prompt)] = prompt
    return decode.init_state(
      self.model.config,
      self.plan,
      tokens=tokens,
      prompt_length=np.full(rows, len(prompt), np.int32),
      requests=requests(rows),
    )

  def prefill(self, state: decode.DecodeState) -> decode.DecodeState:
    return decode.prefill_chunk(
      self.model, self.params, state, chunk=16, visibility=decode.Causal()
    )

  def insert(self, prompt, slot: int) -> None:
    row = self.prefill(self.empty(1, prompt))
    self.state = decode.insert_row(self.state, row, np.int32(slot), requests(1))

  def run(self, steps: int) -> None:
    self.state = decode.run_steps(
      self.model, self.params, self.state, steps, plan=self.plan, visibility=decode.Causal()
    )

  def alone(self, prompt) -> decode.Completion:
    return decode.generate(
      self.model, self.params, [prompt], max_new_tokens=8, policy=POLICY
    ).completions[0]


@pytest.fixture(params=[HeadKind.NORM, HeadKind.LAYER], ids=lambda head: head.value)
def decoding(tiny, request: pytest.FixtureRequest) -> Decoding:
  return Decoding(tiny, request.param)


def test_rows_join_at_any_step_and_read_as_alone(decoding: Decoding, prompts):
  assert np.all(decoding.state.done)
  decoding.insert(prompts[0], 2)
  decoding.run(3)
  decoding.insert(prompts[2], 0)
  decoding.run(20)
  gains = jax.device_get(decode.read_gains(decoding.state, np.zeros(3, np.int32), width=8))
  for slot, prompt in ((2, prompts[0]), (0, prompts[2])):
    expected = decoding.alone(prompt)
    assert gains.tokens[slot].tolist() == expected.tokens.tolist()
    assert gains.exit_layer[slot].tolist() == expected.exit_layers.tolist()
    assert np.allclose(gains.log_prob[slot], expected.log_probs, atol=1e-3)
    assert gains.top_ids[slot].tolist() == expected.top_ids.tolist()
    assert gains.step[slot] == 8
    assert gains.stop_reason[slot] == decode.StopReason.BUDGET
  assert gains.step[1] == 0


def test_a_window_begins_at_what_was_seen(decoding: Decoding, prompts):
  decoding.insert(prompts[0], 1)
  decoding.run(8)
  seen = np.asarray([0, 5, 0], np.int32)
  gains = jax.device_get(decode.read_gains(decoding.state, seen, width=2))
  assert gains.tokens[1].tolist() == decoding.alone(prompts[0]).tokens[5:7].tolist()


def test_a_released_row_stays_where_it_is(decoding: Decoding, prompts):
  decoding.insert(prompts[0], 0)
  decoding.insert(prompts[2], 1)
  decoding.run(2)
  decoding.state = decode.release_rows(decoding.state, np.asarray([True, False, False]))
  decoding.run(20)
  assert np.asarray(decoding.state.step).tolist() == [2, 8, 0]


def test_a_chunk_of_another_row_stands_for_prefill(decoding: Decoding):
  prompt = [*range(1, 31)]
  first = decoding.prefill(decoding.empty(1, prompt))
  chunk = decode.read_chunk(first, np.int32(0), chunk=8)
  row = decode.write_chunk(decoding.empty(1, prompt), chunk, np.int32(0))
  assert np.all(np.asarray(row.fill) == 8)
  for _ in range(2):
    row = decoding.prefill(row)
  decoding.state = decode.insert_row(decoding.state, row, np.int32(0), requests(1))
  decoding.run(8)
  tokens = np.asarray(decoding.state.tokens)[0, 30:38]
  assert tokens.tolist() == decoding.alone(prompt).tokens.tolist()
