"""Texts written after many prompts, in batches, until a stop string."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel
from exitax.data import Progress, StreamDecoder, Tokenizer, quiet
from exitax.decode import Completion, ExitPolicy, Sampler, StopReason, prepare_params, stream
from exitax.parallel import ShardingRules, use

# Tokens between two looks for stop strings.
_TOKENS_PER_LOOK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
  """One text to write.

  Attributes:
    prompt: token ids, the start included.
    max_new_tokens: at most.
    stops: the text ends before the first of these strings.
    sampler: how tokens are chosen.
    seed: of the sampling.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int
  stops: tuple[str, ...] = ()
  sampler: Sampler = Sampler()
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class WrittenText:
  """A text and how deep its tokens went.

  Attributes:
    text: without the stop string.
    exit_layers: layers of each token, those of the stop string included.
  """

  text: str
  exit_layers: tuple[int, ...]


class TextWriter:
  """Writes texts with one policy after another; keeps the parameters in the layout of decoding."""

  def __init__(
    self,
    loaded: LoadedModel,
    *,
    mesh: Mesh,
    rules: ShardingRules,
    batch_size: int,
    progress: Progress = quiet,
  ) -> None:
    """Takes a model; arguments as for `Scorer`."""
    self._model, self._tokenizer = loaded.model, loaded.tokenizer
    self._mesh, self._rules = mesh, rules
    self._batch_size, self._progress = batch_size, progress
    with use(mesh, rules):
      self._params = prepare_params(loaded.model, loaded.params)

  def __call__(self, requests: Sequence[TextRequest], *, policy: ExitPolicy) -> list[WrittenText]:
    """One text per request, in their order."""
    batches = self._batches(requests)
    label = f'writing {len(requests)} texts'
    found: dict[int, WrittenText] = {}
    for batch in self._progress(batches, total=len(batches), label=label):
      # A last batch is filled up with copies, so that it needs no program of its own.
      size = min(self._batch_size, len(requests))
      rows = [*batch, *[batch[-1]] * (size - len(batch))]
      written = self._write([requests[i] for i in rows], policy)
      found |= zip(batch, written, strict=False)
    return [found[i] for i in range(len(requests))]

  def _batches(self, requests: Sequence[TextRequest]) -> list[list[int]]:
    """Numbers of requests of one budget and like length, long ones first."""
    groups: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(request.max_new_tokens, []).append(i)
    batches = []
    for members in groups.values():
      ordered = sorted(members, key=lambda i: -len(requests[i].prompt))
      size = self._batch_size
      batches += [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return batches

  def _write(self, requests: Sequence[TextRequest], policy: ExitPolicy) -> list[WrittenText]:
    texts = [_Growing(self._tokenizer, request.stops) for request in requests]
    with use(self._mesh, self._rules):
      events = stream(
        self._model,
        self._params,
        [request.prompt for request in requests],
        max_new_tokens=requests[0].max_new_tokens,
        policy=policy,
        sampler=[request.sampler for request in requests],
        stop_tokens=self._tokenizer.stop_ids,
        seed=[request.seed for request in requests],
        tokens_per_event=_TOKENS_PER_LOOK,
      )
      for event in events:
        for text, gain in zip(texts, event.gains, strict=True):
          text.add(gain)
        if all(text.ended for text in texts):
          break
    return [text.finish() for text in texts]


class _Growing:
  """A text while it is written."""

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
    self._decoder = StreamDecoder(tokenizer)
    self._stops = tuple(stop for stop in stops if stop)
    self._text = ''
    self._layers: list[int] = []
    self.ended = False

  def add(self, gain: Completion) -> None:
    """Takes new tokens up, until the text has ended."""
    tokens = gain.tokens.tolist()
    # A stop token is no text.
    shown = len(tokens) - (gain.stop_reason is StopReason.STOP_TOKEN)
    for i, (token, layer) in enumerate(zip(tokens, gain.exit_layers.tolist(), strict=True)):
      if self.ended:
        return
      self._layers.append(layer)
      if i < shown:
        self._text += self._decoder.push(token)
        self.ended = bool(self._found())
    self.ended = self.ended or gain.stop_reason is not StopReason.RUNNING

  def finish(self) -> WrittenText:
    """The text, whole."""
    if not self._found():
      self._text += self._decoder.finish()
    end = min(self._found(), default=len(self._text))
    return WrittenText(text=self._text[:end], exit_layers=tuple(self._layers))

  def _found(self) -> list[int]:
    return [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
