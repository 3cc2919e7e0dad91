"""From requests to jobs for the engine: tokens, budgets, seeds, exits, all checked before they queue."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence

from exitax.data import ThinkTemplate, Tokenizer, begin_prompt, encode_prompt
from exitax.decode import Sampler
from exitax.errors import UserError
from exitax.serve.chat import ChatTemplate
from exitax.serve.engine import Engine
from exitax.serve.jobs import Job
from exitax.serve.metrics import Metrics
from exitax.serve.protocol import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationRequest
from exitax.serve.refusals import Refusal, bad_request
from exitax.serve.strategies import Strategies
from exitax.serve.thinkers import check_thinkers, together_of

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions.
# Scores divided by less than this would overflow: the limit is greedy.
_COLDEST = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A request that can be run.

  Attributes:
    jobs: one per prompt.
    stops: stop strings.
    echoes: text that comes before each choice.
    thinkers: which thinker writes each choice, from 1; None for an answer. None for requests without thinkers.
  """

  jobs: tuple[Job, ...]
  stops: tuple[str, ...]
  echoes: tuple[str, ...]
  thinkers: tuple[int | None, ...] | None = None

  @property
  def prompt_tokens(self) -> int:
    """Tokens of all prompts, headers of thinkers included."""
    return sum(len(job.prompt) + job.num_header_tokens for job in self.jobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
  """Everything that answers are made of.

  Attributes:
    name: of the model.
    tokenizer: the model's.
    vocab_size: ids that the model knows.
    context: tokens of prompt and answer together.
    max_logprobs: alternatives per token that can be asked for.
    strategies: what can be asked of exits.
    template: for chats.
    think_template: what thinkers are told.
    max_thinkers: of a request at most.
    engine: what runs jobs.
    metrics: what is counted.
    sampling: fields of `Sampler` for requests that do not name them; OpenAI's by default.
  """

  name: str
  tokenizer: Tokenizer
  vocab_size: int
  context: int
  max_logprobs: int
  strategies: Strategies
  template: ChatTemplate
  think_template: ThinkTemplate
  max_thinkers: int
  engine: Engine
  metrics: Metrics
  sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def completion(self, request: CompletionRequest) -> Work:
    """What a completion request asks for.

    Raises:
      Refusal: 400, 404 or 422 with the reason.
    """
    if request.best_of not in (None, request.n or 1):
      raise bad_request('best_of must equal n: all samples are returned', param='best_of')
    if request.echo and request.logprobs is not None:
      raise bad_request(
        "echo with logprobs needs the prompt's, which this server does not compute", param='echo'
      )
    check_thinkers(request, most=self.max_thinkers)
    prompts = self._prompts(request)
    echoes = [text for text, _ in prompts] if request.echo else [''] * len(prompts)
    default = DEFAULT_MAX_TOKENS
    return self._work(
      request,
      [ids for _, ids in prompts],
      echoes=echoes,
      max_tokens=request.max_tokens or default,
      stops=request.stop_strings,
    )

  def chat(self, request: ChatRequest) -> Work:
    """What a chat request asks for.

    Raises:
      Refusal: 400, 404 or 422 with the reason.
    """
    if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
      raise bad_request(
        'max_tokens and max_completion_tokens differ: give one', param='max_completion_tokens'
      )
    if request.top_logprobs and not request.logprobs:
      raise bad_request('top_logprobs needs logprobs=true', param='top_logprobs')
    check_thinkers(request, most=self.max_thinkers)
    messages = [message.for_template() for message in request.messages]
    if request.thinkers:
      # What they are told stands around the last message; the chat's own template around all.
      messages[-1]['content'] = self._told(messages[-1]['content'], request.thinkers)
    text = self.template.render(messages)
    ids = self._encode(text, param='messages')
    # Templates of models that have a start token write it themselves.
    prompt = begin_prompt(self.tokenizer, ids)
    wanted = request.max_completion_tokens or request.max_tokens
    return self._work(
      request,
      [prompt],
      echoes=[''],
      max_tokens=wanted or self._what_fits(request, len(prompt)),
      stops=(*request.stop_strings, *self.template.stops),
    )

  def _prompts(self, request: CompletionRequest) -> list[tuple[str, list[int]]]:
    """Each prompt's text, decoded only if it is to be echoed, and its ids."""
    prompt = request.prompt
    if isinstance(prompt, str):
      several: Sequence[str | int | list[int]] = [prompt]
    elif prompt and isinstance(prompt[0], int):
      several = [[int(token) for token in prompt if isinstance(token, int)]]
    else:
      several = prompt
    if not several:
      raise bad_request('prompt is an empty list: give at least one prompt', param='prompt')
    each, what = request.n or 1, f'n={request.n or 1}'
    if request.thinkers:
      each, what = request.thinkers + bool(request.answer_tokens), f'thinkers={request.thinkers}'
    if len(several) * each > MAX_CHOICES:
      raise bad_request(
        f'{len(several)} prompts with {what} are more than {MAX_CHOICES} choices: '
        'send them in several requests',
        param='prompt',
      )
    found = []
    for item in several:
      if isinstance(item, str):
        text = self._told(item, request.thinkers) if request.thinkers else item
        found.append((item, self._encode(text, param='prompt', start=True)))
      else:
        ids = list(item) if isinstance(item, list) else [item]
        self._check_ids(ids)
        found.append((self.tokenizer.decode(ids) if request.echo else '', ids))
    return found

  def _work(
    self,
    request: GenerationRequest,
    prompts: Sequence[list[int]],
    *,
    echoes: Sequence[str],
    max_tokens: int,
    stops: tuple[str, ...],
  ) -> Work:
    self._check_model(request.model)
    together = together_of(request, self.think_template, self.tokenizer)
    thinkers = None if together is None else together.labels
    if together is not None and thinkers == (1,):
      # One thinker alone is an ordinary text behind its header, and may speculate.
      prompts = [[*prompt, *together.headers[0]] for prompt in prompts]
      together = None
    self._check_logprobs(request)
    sampler = sampler_of(request, self.sampling)
    chosen = self.strategies.choose(
      strategy=request.strategy,
      threshold=request.threshold,
      confidence=request.confidence,
      use_early_exit=request.use_early_exit,
      max_tokens=max_tokens,
      temperature=sampler.temperature,
      together=together is not None,
    )
    samples = request.n or 1
    seed = secrets.randbits(32) if request.seed is None else request.seed
    stop_tokens = () if request.ignore_eos else self.tokenizer.stop_ids
    choices = samples if thinkers is None else len(thinkers)
    jobs = tuple(
      Job(
        prompt=tuple(prompt),
        seeds=tuple(seed + number * samples + i for i in range(samples)),
        first_choice=number * choices,
        together=together,
        budget=max_tokens,
        sampler=sampler,
        stop_tokens=stop_tokens,
        strategy=chosen.strategy,
        thresholds=chosen.thresholds,
        num_top=request.num_top or 0,
      )
      for number, prompt in enumerate(prompts)
    )
    for job in jobs:
      self._check_length(job)
    return Work(
      jobs=jobs,
      stops=stops,
      echoes=tuple(echo for echo in echoes for _ in range(choices)),
      thinkers=None if thinkers is None else thinkers * len(prompts),
    )

  def _told(self, problem: str, thinkers: int) -> str:
    return self.think_template.filled('prompt', problem=problem, thinkers=thinkers)

  def _encode(self, text: str, *, param: str, start: bool = False) -> list[int]:
    try:
      return encode_prompt(self.tokenizer, text) if start else self.tokenizer.encode(text)
    except UserError as error:
      raise bad_request(str(error), param=param) from None

  def _check_ids(self, ids: Sequence[int]) -> None:
    if not ids:
      raise bad_request('a prompt of token ids is empty: give at least one', param='prompt')
    low, high = min(ids), max(ids)
    if low < 0 or high >= self.vocab_size:
      raise bad_request(
        f'token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}',
        param='prompt',
      )

  def _check_model(self, name: str | None) -> None:
    if name not in (None, self.name):
      raise Refusal(
        404,
        f'no model {name[:80]!r} here: this server has {self.name!r}',
        param='model',
        code='model_not_found',
      )

  def _check_logprobs(self, request: GenerationRequest) -> None:
    field = 'top_logprobs' if isinstance(request, ChatRequest) else 'logprobs'
    if (request.num_top or 0) > self.max_logprobs:
      raise bad_request(
        f'{field}={request.num_top} exceeds what this server records, {self.max_logprobs} '
        '(--max_logprobs)',
        param=field,
      )

  def _what_fits(self, request: ChatRequest, prompt_tokens: int) -> int:
    """Tokens of the one who answers, or of each thinker, that the context has room for; 1 at least."""
    room = self.context - prompt_tokens
    together = together_of(request, self.think_template, self.tokenizer)
    if together is not None:
      room = (room - together.length(0)) // together.size
    return max(room, 1)

  def _check_length(self, job: Job) -> None:
    prompt_tokens, excess = len(job.prompt), job.length - self.context
    if excess <= 0:
      return
    asked, size = f'{job.budget} to generate', job.num_texts
    fitting = job.budget - -(-excess // size)
    fix = f'shorten the prompt or ask for at most {max(fitting, 0)}'
    param = 'prompt' if prompt_tokens >= self.context else 'max_tokens'
    if job.together:
      asked = f'{job.length - prompt_tokens} of {size} thinkers, headers and answer included,'
      fix += ' of each'
      if fitting < 1 and param != 'prompt':
        fix, param = 'lower thinkers or answer_tokens', 'thinkers'
    raise bad_request(
      f'a prompt of {prompt_tokens} tokens and {asked} exceed the context of {self.context}: {fix}',
      param=param,
      code='context_length_exceeded',
    )


def sampler_of(request: GenerationRequest, defaults: Mapping[str, float]) -> Sampler:
  """What is asked for, else the model's defaults, else OpenAI's: temperature 1, nothing filtered."""
  fields = {'temperature': 1.0, **defaults}
  for field in dataclasses.fields(Sampler):
    value = getattr(request, field.name)
    if value is not None:
      fields[field.name] = value
  if fields['temperature'] < _COLDEST:
    fields['temperature'] = 0.0
  return Sampler(**fields)  # type: ignore[arg-type]
