"""Group Think with text: a problem in, thinkers' words as they come, and an answer that has read them all."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

from exitax.data import StreamDecoder, ThinkTemplate, Tokenizer, encode_prompt
from exitax.decode import (
  CacheFormat,
  Completion,
  ExitPolicy,
  Group,
  GroupRun,
  Positions,
  Sampler,
  Sees,
  Spare,
  StopReason,
  ThinkConfig,
  Thinker,
)
from exitax.errors import UserError, choose
from exitax.models import ExitLM, Params

ANSWER = -1  # Number of the text that sums up.
_logger = logging.getLogger('exitax')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkSettings:
  """How a group thinks.

  Attributes:
    thinkers: how many.
    max_new_tokens: of each at most.
    answer_tokens: of the answer at most; 0 gives none.
    visibility: 'full', 'interleaved', 'strict', 'lag:D' or 'none': which tokens of the others each sees.
    positions: 'slots' or 'shared'.
    slot_width: positions of each thinker; None takes header and `max_new_tokens`.
    seed: thinkers differ by their numbers, which are part of their random numbers.
    template: a TOML file; None takes the one that comes with exitax.
  """

  thinkers: int = 4
  max_new_tokens: int = 64
  answer_tokens: int = 64
  visibility: str = 'full'
  positions: str = 'slots'
  slot_width: int | None = None
  seed: int = 0
  template: str | None = None

  def __post_init__(self) -> None:
    for name, least in (('thinkers', 1), ('max_new_tokens', 1), ('answer_tokens', 0)):
      if getattr(self, name) < least:
        raise UserError(f'{name}={getattr(self, name)} must be at least {least}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoughtEvent:
  """A token, as it comes.

  Attributes:
    thinker: whose, from 0; `ANSWER` of the text that sums up.
    piece: its text; an incomplete character shows with the token that completes it.
    token: its id.
    exit_layer: layers run when it was chosen.
    confidence: at the exit that chose it.
    stop_reason: why the text ends with it; RUNNING if it goes on.
  """

  thinker: int
  piece: str
  token: int
  exit_layer: int
  confidence: float
  stop_reason: StopReason


def stream_thoughts(
  model: ExitLM,
  params: Params,
  tokenizer: Tokenizer,
  problem: str,
  settings: ThinkSettings,
  *,
  policy: ExitPolicy,
  sampler: Sampler,
  stop_tokens: Sequence[int],
  cache_format: CacheFormat,
) -> Iterator[ThoughtEvent]:
  """Yields all tokens of the thinkers, a step at a time, then those of the answer.

  Raises:
    UserError: settings or texts that the model has no room for.
  """
  template, size = ThinkTemplate.read(settings.template), settings.thinkers
  headers = [
    tokenizer.encode(template.filled('header', problem=problem, thinkers=size, thinker=number))
    for number in range(size)
  ]
  answer = tokenizer.encode(template.filled('answer', problem=problem, thinkers=size))
  group = Group(
    prompt=encode_prompt(tokenizer, template.filled('prompt', problem=problem, thinkers=size)),
    thinkers=[Thinker(header=header, sampler=sampler, seed=settings.seed) for header in headers],
    sees=Sees.parse(settings.visibility),
  )
  config = ThinkConfig(
    max_new_tokens=settings.max_new_tokens,
    positions=choose(Positions, settings.positions, name='positions'),
    slot_width=settings.slot_width,
  )
  _warn_of_twins(group, config)
  answers = settings.answer_tokens > 0
  run = GroupRun(
    model,
    params,
    [group],
    config,
    policy=policy,
    stop_tokens=stop_tokens,
    cache_format=cache_format,
    spare=Spare(texts=1, tokens=len(answer) + settings.answer_tokens) if answers else Spare(),
  )
  decoders = [StreamDecoder(tokenizer) for _ in range(size + 1)]
  yield from _events(run, decoders)
  if answers:
    writer = Thinker(
      header=answer or group.prompt[-1:],
      sampler=sampler,
      seed=settings.seed,
      max_new_tokens=settings.answer_tokens,
      number=size,
      slot=size,
    )
    run.start(size, 0, writer, sees_all=True)
    yield from _events(run, decoders)


def _events(run: GroupRun, decoders: Sequence[StreamDecoder]) -> Iterator[ThoughtEvent]:
  while not run.done:
    for text, gain in enumerate(run.advance(1)):
      yield from _pieces(text if text < len(decoders) - 1 else ANSWER, gain, decoders[text])


def _pieces(thinker: int, gain: Completion, decoder: StreamDecoder) -> Iterator[ThoughtEvent]:
  for index, token in enumerate(gain.tokens.tolist()):
    last = index == len(gain.tokens) - 1
    reason = gain.stop_reason if last else StopReason.RUNNING
    piece = '' if reason is StopReason.STOP_TOKEN else decoder.push(token)
    if reason is not StopReason.RUNNING:
      piece += decoder.finish()
    yield ThoughtEvent(
      thinker=thinker,
      piece=piece,
      token=token,
      exit_layer=int(gain.exit_layers[index]),
      confidence=float(gain.confidences[index]),
      stop_reason=reason,
    )


def _warn_of_twins(group: Group, config: ThinkConfig) -> None:
  """Thinkers whom nothing tells apart write the same for ever."""
  greedy = all(thinker.sampler.temperature == 0 for thinker in group.thinkers)
  alike = len({tuple(thinker.header) for thinker in group.thinkers}) < len(group.thinkers)
  told_apart = config.positions is Positions.SLOTS or group.sees.by_rank
  if greedy and alike and not told_apart:
    _logger.warning(
      'thinkers have the same header and choose greedily at the same positions: they will stay '
      'identical; give a temperature, or name them with {thinker} in the header'
    )
