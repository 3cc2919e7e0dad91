"""`exitax serve` under load on loopback, beside offline decoding of the same requests.

  python benchmarks/serve_load.py [--quick]

A Llama shape of 27.8M parameters (8 layers, width 512, vocabulary 4096, exits after layers 2 and 4),
float32, random weights; prompts of 64 tokens, 64 new tokens each, 8 at once. The server is a process of its
own; client and server share the machine.

- Throughput: all requests at once, in turns with `decode.generate` of the same requests in batches of 8.
- Latency: a Poisson process at 70% of the throughput just measured at full depth, pinned for both rows, in turns: full
  depth, and early exit at the threshold that half of the tokens pass at the first exit.
- Streams killed after their first token, then slots still in use; malformed requests, then one that must be answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Effort, Goal, effort_from_arguments, finish, median_ratio, say
from load_client import Client, Outcome, malformed

from exitax import decode
from exitax.checkpoint import CheckpointManager, checkpoints_directory, write_model
from exitax.data import ByteTokenizer
from exitax.models import ExitConfig, ExitLM, ModelConfig, Params

CONFIG = ModelConfig(
  vocab_size=4096,
  num_layers=8,
  embed_dim=512,
  num_heads=8,
  mlp_dim=1408,
  max_length=512,
  exits=(ExitConfig(layer=2), ExitConfig(layer=4)),
)
SLOTS, PROMPT, NEW_TOKENS = 8, 64, 64
LOAD = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How much is sent.

  Attributes:
    burst: requests of a throughput measurement.
    rounds: of throughput, online and offline in turns.
    arrivals: requests of a latency measurement, shared by the rounds.
    killed: clients that vanish.
    malformed: requests that are none.
  """

  burst: int
  rounds: int
  arrivals: int
  killed: int
  malformed: int


SIZES = {
  Effort.QUICK: Sizes(burst=16, rounds=2, arrivals=20, killed=20, malformed=1000),
  Effort.NORMAL: Sizes(burst=48, rounds=5, arrivals=200, killed=100, malformed=10_000),
  Effort.FULL: Sizes(burst=96, rounds=9, arrivals=1000, killed=500, malformed=10_000),
}


def main() -> None:
  """Measures, and prints a table and one JSON object."""
  sizes = SIZES[effort_from_arguments(__doc__)]
  model = ExitLM(CONFIG)
  params = model.init(jax.random.key(0))
  with tempfile.TemporaryDirectory() as folder:
    write_model(folder, CONFIG, ByteTokenizer())
    with CheckpointManager(checkpoints_directory(folder)) as manager:
      manager.save(0, {'params': params})
    threshold = _median_confidence(model, params)
    say(f'half of the tokens leave after layer 2 at threshold {threshold:.6f}')
    with server(Path(folder)) as address:
      rows, goals = asyncio.run(_measure(address, model, params, threshold, sizes))
  finish('serve_load', rows, goals)


async def _measure(
  address: tuple[str, int], model: ExitLM, params: Params, threshold: float, sizes: Sizes
) -> tuple[list[dict[str, Any]], list[Goal]]:
  client, metrics = Client(*address), Metrics(*address)
  policies = {
    'full': ({'strategy': 'full'}, decode.FullDepth()),
    'exits': ({'threshold': threshold}, decode.DeferredExit(threshold=threshold)),
  }
  online: dict[str, list[float]] = {name: [] for name in policies}
  offline: dict[str, list[float]] = {name: [] for name in policies}
  prepared = decode.prepare_params(model, params)
  prompts = _prompts(sizes.burst)
  for name, (_, policy) in policies.items():
    say(f'compiling offline decoding: {name}')
    _offline(model, prepared, prompts[:SLOTS], policy)
  for number in range(sizes.rounds):
    say(f'throughput, round {number + 1} of {sizes.rounds}')
    for name, (fields, policy) in policies.items():
      offline[name].append(_offline(model, prepared, prompts, policy))
      start = time.perf_counter()
      outcomes = await client.burst([_body(prompt, fields) for prompt in prompts])
      seconds = time.perf_counter() - start
      online[name].append(sum(outcome.tokens for outcome in outcomes) / seconds)
  capacity = float(np.median(online['full'])) / NEW_TOKENS
  rate = LOAD * capacity
  latencies: dict[str, list[Outcome]] = {name: [] for name in policies}
  arrivals = _prompts(sizes.arrivals // sizes.rounds)
  for number in range(sizes.rounds):
    say(f'arrivals at {rate:.2f} per second, round {number + 1} of {sizes.rounds}')
    for name, (fields, _) in policies.items():
      bodies = [_body(prompt, fields) for prompt in arrivals]
      latencies[name] += await client.open_loop(bodies, rate=rate, seed=number)
  rows = [_row(name, online[name], offline[name], latencies[name], rate) for name in policies]
  leaked = await _kill(client, metrics, sizes.killed)
  await _send_malformed(client, sizes.malformed)
  full = latencies['full']
  goals = [
    Goal(
      name='completed_at_70pct_load',
      value=min(_completed(outcomes) for outcomes in latencies.values()),
      op='>=',
      goal=0.99,
    ),
    Goal(
      name='throughput_of_offline',
      value=median_ratio(online['full'], offline['full']),
      op='>=',
      goal=0.8,
    ),
    Goal(name='ttft_p99_s', value=_percentile([o.first for o in full], 99), op='<=', goal=2.0),
    Goal(name='leaked_slots', value=leaked, op='<=', goal=0),
    Goal(name='server_errors', value=metrics.server_errors(), op='<=', goal=0),
  ]
  return rows, goals


# The two sides.


@contextlib.contextmanager
def server(model_dir: Path) -> Iterator[tuple[str, int]]:
  """A running server's host and port."""
  say('starting the server')
  flags = {
    'model_dir': model_dir,
    'port': 0,
    'num_slots': SLOTS,
    'capacity': PROMPT + NEW_TOKENS,
    'max_queue': 2000,
    'prefix_cache_bytes': 0,
  }
  command = [sys.executable, '-m', 'exitax', 'serve']
  command += [f'--{name}={value}' for name, value in flags.items()]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    try:
      for line in iter(process.stdout.readline, ''):
        if found := re.match(r'serving at http://([\d.]+):(\d+)', line):
          yield found.group(1), int(found.group(2))
          break
      else:
        raise RuntimeError('the server did not start')
      process.send_signal(signal.SIGTERM)
      process.wait(timeout=60)
    finally:
      process.kill()


def _offline(
  model: ExitLM, params: Params, prompts: Sequence[list[int]], policy: decode.ExitPolicy
) -> float:
  """Tokens/s of `decode.generate`, a batch of `SLOTS` after the other."""
  start = time.perf_counter()
  tokens = 0
  for i in range(0, len(prompts), SLOTS):
    batch = prompts[i : i + SLOTS]
    result = decode.generate(model, params, batch, max_new_tokens=NEW_TOKENS, policy=policy)
    tokens += int(result.lengths.sum())
  return tokens / (time.perf_counter() - start)


class Metrics:
  """The server's own numbers."""

  def __init__(self, host: str, port: int) -> None:
    """Takes the server's address."""
    self._url = f'http://{host}:{port}/metrics'

  def read(self) -> str:
    """The page."""
    with urllib.request.urlopen(self._url, timeout=10) as answer:
      return answer.read().decode()

  def in_use(self) -> float:
    """Slots with a request, and prompts that wait."""
    text = self.read()
    return sum(
      float(value) for value in re.findall(r'^exitax_(?:slots_used|waiting) (\S+)', text, re.M)
    )

  def server_errors(self) -> float:
    """Answers with a status of 500 or more."""
    found = re.findall(r'^exitax_requests_total\{.*status="5\d\d"\} (\S+)', self.read(), re.M)
    return sum(map(float, found))


# Trouble.


async def _kill(client: Client, metrics: Metrics, count: int) -> float:
  """Slots in use after clients have vanished in mid-stream."""
  say(f'{count} clients vanish after their first token')
  body = {**_body(_prompts(1)[0], {}), 'n': 2}
  for _ in range(0, count, SLOTS):
    await asyncio.gather(*(client.stream(body, kill_after_first=True) for _ in range(SLOTS)))
  end = time.perf_counter() + 10
  while metrics.in_use() and time.perf_counter() < end:
    await asyncio.sleep(0.1)
  return metrics.in_use()


async def _send_malformed(client: Client, count: int) -> None:
  """Sends what is no request; the server must answer all with 4xx, and then a good one."""
  say(f'{count} malformed requests')
  rng = random.Random(0)
  statuses = await client.statuses([malformed(rng) for _ in range(count)])
  good = await client.stream(_body(_prompts(1)[0], {}))
  if not all(400 <= status < 500 for status in statuses) or good.tokens != NEW_TOKENS:
    raise RuntimeError(f'statuses {sorted(set(statuses))}, then {good}')


# Numbers.


def _row(
  name: str,
  online: Sequence[float],
  offline: Sequence[float],
  outcomes: Sequence[Outcome],
  rate: float,
) -> dict[str, Any]:
  finished = [o for o in outcomes if o.status == 200 and o.tokens == NEW_TOKENS]
  per_token = [(o.total - o.first) / (NEW_TOKENS - 1) for o in finished]
  return {
    'name': name,
    'tokens_per_s': float(np.median(online)),
    'offline_tokens_per_s': float(np.median(offline)),
    'of_offline': median_ratio(online, offline),
    'requests_per_s': rate,
    'completed': _completed(outcomes),
    'ttft_p50_s': _percentile([o.first for o in finished], 50),
    'ttft_p99_s': _percentile([o.first for o in finished], 99),
    'per_token_p50_s': _percentile(per_token, 50),
    'per_token_p99_s': _percentile(per_token, 99),
    'total_p50_s': _percentile([o.total for o in finished], 50),
    'total_p99_s': _percentile([o.total for o in finished], 99),
    'layers_per_token': float(np.mean([o.layers for o in finished])) if finished else math.nan,
  }


def _completed(outcomes: Sequence[Outcome]) -> float:
  good = [o for o in outcomes if o.status == 200 and o.tokens == NEW_TOKENS]
  return len(good) / len(outcomes)


def _percentile(values: Sequence[float], q: float) -> float:
  return float(np.percentile(values, q)) if values else math.inf


def _body(prompt: list[int], fields: dict[str, Any]) -> dict[str, Any]:
  return {
    'prompt': prompt,
    'max_tokens': NEW_TOKENS,
    'temperature': 0,
    'ignore_eos': True,
    **fields,
  }


def _prompts(count: int) -> list[list[int]]:
  rng = np.random.default_rng(0)
  return rng.integers(0, CONFIG.vocab_size, (count, PROMPT)).tolist()


def _median_confidence(model: ExitLM, params: Params) -> float:
  """The threshold that half of the tokens pass at the first exit."""
  policy = decode.DeferredExit(threshold=0.0)
  result = decode.generate(model, params, _prompts(SLOTS), max_new_tokens=NEW_TOKENS, policy=policy)
  return float(np.median([completion.confidences for completion in result.completions]))


if __name__ == '__main__':
  main()
