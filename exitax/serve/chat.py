"""Chat templates: messages to one prompt, rendered where templates can do no harm."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exitax.checkpoint import read_json
from exitax.errors import UserError
from exitax.serve.refusals import bad_request

# For models whose tokenizer says nothing: plain words, which a model of plain text can go on from.
PLAIN_TEMPLATE = """\
{%- for message in messages %}{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOPS = ('\nUser:', '\nSystem:')
# Beside a tokenizer, as transformers writes them.
TEMPLATE_FILE = 'chat_template.jinja'
CONFIG_FILE = 'tokenizer_config.json'


class ChatTemplate:
  """A Jinja template with the variables and helpers that Hugging Face's templates expect.

  It runs in Jinja's immutable sandbox: no private attributes, no changes to what it is given.

  Attributes:
    stops: stop strings that go with the template.
  """

  def __init__(self, source: str, *, where: str, stops: Sequence[str] = ()) -> None:
    """Compiles a template.

    Args:
      source: the template.
      where: where it comes from, for messages.
      stops: stop strings of every answer to it.

    Raises:
      UserError: it is not a template.
    """
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.filters['tojson'] = _tojson
    environment.globals['raise_exception'] = _raise
    environment.globals['strftime_now'] = _strftime_now
    self.stops, self._where = tuple(stops), where
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise UserError(f'chat template {where} is not Jinja: {error}') from None

  def render(
    self, messages: Sequence[Mapping[str, Any]], *, specials: Mapping[str, str] | None = None
  ) -> str:
    """The prompt for the next answer.

    Args:
      messages: dictionaries with `role` and `content`.
      specials: `bos_token` and its like, as text.

    Raises:
      Refusal: 400, the template refuses the messages or fails on them.
    """
    variables = {'bos_token': '', 'eos_token': '', **(specials or {})}
    try:
      return self._template.render(messages=messages, add_generation_prompt=True, **variables)
    except jinja2.TemplateError as error:
      raise bad_request(f'the chat template refuses: {error}', param='messages') from None
    except Exception as error:  # What a template does with odd messages is anybody's guess.
      raise bad_request(
        f'the chat template {self._where} fails on these messages ({type(error).__name__}: {error})',
        param='messages',
      ) from None


def load_chat_template(path: str | None, *, tokenizer_folder: Path) -> ChatTemplate:
  """The template in `path`, else the tokenizer's own, else plain words.

  Raises:
    UserError: the file cannot be read, or is no template.
  """
  if path:
    return ChatTemplate(_read(Path(path), name='--chat_template'), where=path)
  beside = tokenizer_folder / TEMPLATE_FILE
  if beside.is_file():
    return ChatTemplate(_read(beside, name='chat template'), where=str(beside))
  config = tokenizer_folder / CONFIG_FILE
  if config.is_file():
    content = read_json(config)
    if not isinstance(content, dict):
      raise UserError(f'{config} is not a JSON object: mend or remove it')
    if isinstance(content.get('chat_template'), str):
      return ChatTemplate(content['chat_template'], where=str(config))
  return ChatTemplate(PLAIN_TEMPLATE, where='(plain)', stops=PLAIN_STOPS)


def _read(path: Path, *, name: str) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{name}={path} cannot be read: {error}') from None


def _tojson(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
  return datetime.datetime.now().strftime(pattern)
