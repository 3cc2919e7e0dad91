"""What Prometheus can read at /metrics."""

from __future__ import annotations

import dataclasses

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclasses.dataclass(frozen=True)
class Occupancy:
  """How full the engine is.

  Attributes:
    slots: texts at once.
    slots_used: those in use; thinkers keep theirs until their group has ended.
    columns: cache columns of all rows.
    columns_used: columns with a token.
    waiting: prompts in the queue.
    prefix_bytes: held by the prefix cache.
  """

  slots: int
  slots_used: int
  columns: int
  columns_used: int
  waiting: int
  prefix_bytes: int


class Metrics:
  """The server's counters, in a registry of their own."""

  def __init__(self) -> None:
    self._registry = CollectorRegistry()
    self.requests = Counter(
      'exitax_requests',
      'Answers by endpoint and status.',
      ['endpoint', 'status'],
      registry=self._registry,
    )
    self.prompt_tokens = self._counter('exitax_prompt_tokens', 'Tokens of prompts taken.')
    self.generated_tokens = self._counter('exitax_generated_tokens', 'Tokens generated.')
    self.exit_tokens = Counter(
      'exitax_exit_tokens',
      'Tokens generated, by layers run for them.',
      ['layers'],
      registry=self._registry,
    )
    self.prefix_hits = self._counter(
      'exitax_prefix_cache_hit_tokens', 'Tokens of prompts that the prefix cache had.'
    )
    self.cancelled = self._counter('exitax_cancelled', 'Requests whose client went away.')
    self.first_token = self._histogram(
      'exitax_time_to_first_token_seconds', 'From arrival to the first token.'
    )
    self.per_token = self._histogram(
      'exitax_time_per_token_seconds', 'Between the tokens of a sample, after the first.'
    )
    self._gauges = {
      field.name: Gauge(f'exitax_{field.name}', text, registry=self._registry)
      for field, text in zip(
        dataclasses.fields(Occupancy),
        (
          'Texts at once.',
          'Texts in use.',
          'Cache columns of all rows.',
          'Cache columns with a token.',
          'Prompts in the queue.',
          'Bytes of the prefix cache.',
        ),
        strict=True,
      )
    }

  def render(self, occupancy: Occupancy) -> bytes:
    """The text that Prometheus reads."""
    for name, gauge in self._gauges.items():
      gauge.set(getattr(occupancy, name))
    return generate_latest(self._registry)

  def _counter(self, name: str, text: str) -> Counter:
    return Counter(name, text, registry=self._registry)

  def _histogram(self, name: str, text: str) -> Histogram:
    return Histogram(name, text, buckets=_SECONDS, registry=self._registry)
