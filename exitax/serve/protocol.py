"""OpenAI's requests, with fields for exits and thinkers. Types are strict: "false" is no boolean, true no number."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from exitax.serve.refusals import Refusal, bad_policy, bad_request

POLICY_FIELDS = frozenset({'strategy', 'threshold', 'confidence', 'use_early_exit'})
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 128

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenIds = list[int]


class _Strict(BaseModel):
  model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)


class StreamOptions(_Strict):
  """`stream_options`."""

  include_usage: bool = False
  include_obfuscation: bool = False


class _Generation(_Strict):
  """What completions and chat completions share.

  Fields of OpenAI's that change nothing here are taken and ignored; those that would change the
  answer are refused unless they ask for nothing.
  """

  model: str | None = None
  n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
  stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
  seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
  temperature: Annotated[float, Field(ge=0, le=2)] | None = None
  top_p: Annotated[float, Field(gt=0, le=1)] | None = None
  top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
  min_p: Annotated[float, Field(ge=0, le=1)] | None = None
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  ignore_eos: bool | None = None
  # Exit policy.
  strategy: str | None = None
  threshold: float | list[float] | Literal['certified'] | None = None
  confidence: str | None = None
  use_early_exit: bool | None = None
  # Group Think: how many write at once, what each sees of the others, and tokens of an answer that has
  # read them all.
  thinkers: Annotated[int, Field(ge=1)] | None = None
  visibility: Annotated[str, Field(max_length=32)] | None = None
  answer_tokens: Annotated[int, Field(ge=0)] | None = None
  # Taken if they ask for nothing.
  presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
  frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
  logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
  # Taken and ignored.
  user: str | None = None
  metadata: dict[str, str] | None = None
  store: bool | None = None
  service_tier: str | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """`stop` as a tuple."""
    if self.stop is None:
      return ()
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

  @property
  def includes_usage(self) -> bool:
    """Whether a stream ends with its usage."""
    return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(_Generation):
  """`POST /v1/completions`."""

  prompt: str | TokenIds | list[str] | list[TokenIds]
  echo: bool | None = None
  logprobs: Annotated[int, Field(ge=0)] | None = None
  best_of: Annotated[int, Field(ge=1)] | None = None
  suffix: None = None

  @property
  def num_top(self) -> int | None:
    """Alternatives per token to show; None shows no log-probabilities."""
    return self.logprobs


class TextPart(_Strict):
  """Text in a message's list of parts."""

  type: Literal['text']
  text: str


_Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Message(_Strict):
  """A message of a chat.

  Answers come back to a server as its client keeps them, with fields that hold nothing: those are taken.
  """

  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: str | list[TextPart]
  name: str | None = None
  # Taken if they ask for nothing.
  refusal: None = None
  audio: None = None
  function_call: None = None
  tool_calls: _Nothing = None
  annotations: _Nothing = None

  def for_template(self) -> dict[str, Any]:
    """What chat templates read: text in one piece."""
    text = self.content
    if not isinstance(text, str):
      text = ''.join(part.text for part in text)
    named = {} if self.name is None else {'name': self.name}
    return {'role': self.role, 'content': text, **named}


class ResponseFormat(_Strict):
  """`response_format`: text, and nothing else."""

  type: Literal['text']


class ChatRequest(_Generation):
  """`POST /v1/chat/completions`."""

  messages: Annotated[list[Message], Field(min_length=1)]
  max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0)] | None = None
  response_format: ResponseFormat | None = None
  tools: _Nothing = None
  tool_choice: Literal['none', 'auto'] | None = None
  modalities: list[Literal['text']] | None = None

  @property
  def num_top(self) -> int | None:
    """Alternatives per token to show; None shows no log-probabilities."""
    return self.top_logprobs or 0 if self.logprobs else None


GenerationRequest = CompletionRequest | ChatRequest
_Request = TypeVar('_Request', CompletionRequest, ChatRequest)


def parse_request(kind: type[_Request], body: bytes) -> _Request:
  """The request in a JSON body.

  Raises:
    Refusal: 422 for the fields of the exit policy, 400 for all else.
  """
  try:
    return kind.model_validate_json(body)
  except pydantic.ValidationError as error:
    raise _refusal(kind, error) from None


def _refusal(kind: type[BaseModel], error: pydantic.ValidationError) -> Refusal:
  """The first of pydantic's complaints; what was given is quoted, shortened."""
  problems = error.errors(include_url=False, include_context=False)
  first = problems[0]
  if first['type'] == 'json_invalid':
    return bad_request(f'the body is not JSON: {first["msg"]}', code='invalid_json')
  location = [part for part in first['loc'] if isinstance(part, int) or part in _names(kind)]
  param = '.'.join(map(str, location)) or None
  field = str(first['loc'][0]) if first['loc'] else ''
  if first['type'] == 'extra_forbidden':
    unknown = '.'.join(str(part) for part in first['loc'])
    return bad_request(f'unknown field {_short(unknown)}', param=_short(unknown), code='unknown')
  if first['type'] == 'missing':
    return bad_request(f'{param or field} is missing', param=param or field)
  # Of a choice between types pydantic reports every branch.
  same_place = [p['msg'] for p in problems if p['loc'][:1] == first['loc'][:1]]
  wanted = ', or '.join(dict.fromkeys(same_place[:4]))
  message = f'{param or "the body"}: {wanted}; got {_short(first["input"])}'
  if field in POLICY_FIELDS:
    return bad_policy(message, param=field, code='invalid_type')
  return bad_request(message, param=param)


def _names(kind: type[BaseModel]) -> set[str]:
  nested = (Message, TextPart, StreamOptions, ResponseFormat)
  return {name for model in (kind, *nested) for name in model.model_fields}


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else repr(value)
  text = text.encode('ascii', 'backslashreplace').decode()
  return text if len(text) <= 80 else text[:77] + '...'
