"""What a server is told."""

from __future__ import annotations

import dataclasses

from exitax.errors import UserError

MAX_THINKERS = 8  # By default: each step of a group computes as many lanes of attention per row.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
  """Settings of a server: bound in gin, each field also a flag of `exitax serve`.

  Attributes:
    host: address to bind to; loopback, so that only this machine can ask.
    port: 0 takes any that is free.
    num_slots: texts decoded at once: samples, and thinkers.
    max_thinkers: of a request at most; 1 takes none. None is 8, or as many as there are slots.
    capacity: tokens of prompt and answer together at most, of all thinkers of a request together; 0
      takes the model's context.
    max_queue: prompts that may wait for a slot; more are refused (429).
    queue_timeout: seconds that a prompt waits at most (503).
    request_timeout: seconds from arrival to the last token at most (503).
    drain_timeout: seconds that running answers get to finish when the server is told to stop.
    strategy: for requests that name none: 'full', 'deferred' or 'speculative'. By default 'deferred'
      with a threshold, else 'speculative', or 'full' for a model without exits.
    threshold: for requests that exit early and name none; one number, one per exit, or 'certified',
      which takes the one that `exitax calibrate` has certified for the requests that it speaks of,
      and runs the others without loss.
    confidence: a value of `decode.Confidence`; compiled, so the same for all requests. None takes the
      certificate's if the threshold is 'certified', else 'max_prob'.
    weights: 'compute', or 'int8': matrices in 8 bits, an approximation.
    kv_cache: 'compute', or 'int8': keys and values in 8 bits, an approximation.
    max_logprobs: alternatives per token that requests may ask for; each step finds as many.
    prefix_cache_bytes: kept of prompts seen before; 0 keeps nothing.
    chat_template: a Jinja file, in place of the tokenizer's own template.
    think_template: a TOML file with what thinkers are told, as `data.ThinkTemplate` reads it.
  """

  host: str = '127.0.0.1'
  port: int = 8000
  num_slots: int = 8
  max_thinkers: int | None = None
  capacity: int = 0
  max_queue: int = 64
  queue_timeout: float = 30.0
  request_timeout: float = 300.0
  drain_timeout: float = 30.0
  strategy: str | None = None
  threshold: float | tuple[float, ...] | str | None = None
  confidence: str | None = None
  weights: str = 'compute'
  kv_cache: str = 'compute'
  max_logprobs: int = 5
  prefix_cache_bytes: int = 256 << 20
  chat_template: str | None = None
  think_template: str | None = None

  def __post_init__(self) -> None:
    if not self.host:
      # The operating system would take it for every address of this machine.
      raise UserError('host is empty: give 127.0.0.1 for this machine alone, 0.0.0.0 for all')
    if not 0 <= self.port <= 65535:
      raise UserError(f'port={self.port} is outside 0 to 65535 (0 takes any that is free)')
    if self.num_slots < 1:
      raise UserError(f'num_slots={self.num_slots} must be at least 1')
    if self.max_thinkers is not None and not 1 <= self.max_thinkers <= self.num_slots:
      raise UserError(
        f'max_thinkers={self.max_thinkers} is outside 1 to num_slots={self.num_slots}: each takes a slot'
      )
    for name in ('capacity', 'max_queue', 'drain_timeout', 'prefix_cache_bytes', 'max_logprobs'):
      if not getattr(self, name) >= 0:
        raise UserError(f'{name}={getattr(self, name)} must be at least 0')
    for name in ('queue_timeout', 'request_timeout'):
      if not getattr(self, name) > 0:
        raise UserError(f'{name}={getattr(self, name)} must be above 0, in seconds')

  @property
  def thinkers(self) -> int:
    """Of a request at most."""
    return self.max_thinkers or min(MAX_THINKERS, self.num_slots)

  def context(self, max_length: int) -> int:
    """Tokens of prompt and answer together, for a model with a context of `max_length`.

    Raises:
      UserError: more than the model's context, or too few to be of use.
    """
    if self.capacity > max_length:
      raise UserError(f'capacity={self.capacity} exceeds the context of the model, {max_length}')
    if self.capacity == 1:
      raise UserError('capacity=1 leaves no token to generate: give at least 2, or 0')
    return self.capacity or max_length
