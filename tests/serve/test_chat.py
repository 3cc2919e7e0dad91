"""Chat templates: what they are given, what they may not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitax.errors import UserError
from exitax.serve.chat import PLAIN_TEMPLATE, ChatTemplate, load_chat_template
from exitax.serve.refusals import Refusal

MESSAGES = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi {{ 7*7 }}'}]


def render(source: str, messages=MESSAGES) -> str:
  return ChatTemplate(source, where='test').render(messages)


def test_the_plain_template():
  assert render(PLAIN_TEMPLATE) == 'System: Be brief.\nUser: Hi {{ 7*7 }}\nAssistant:'


def test_a_template_in_the_style_of_hugging_face():
  source = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ {"a": "é"} | tojson }}'
  )
  text = ChatTemplate(source, where='test').render(MESSAGES, specials={'bos_token': '<s>'})
  assert text == ('<s><|im_start|>user\nHi {{ 7*7 }}<|im_end|>\n<|im_start|>assistant\n{"a": "é"}')


@pytest.mark.parametrize(
  'source',
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    '{{ messages.__class__.__base__.__subclasses__()[0] }}',
    '{{ self.__init__.__globals__ }}',
    "{{ raise_exception.__globals__['__builtins__'] }}",
    '{{ raise_exception.__code__.co_code }}',
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    '{{ messages.append(1) }}',
    "{{ messages[0].update({'role': 'x'}) }}",
    '{% set x = messages.pop() %}{{ x }}',
    '{{ range(1000000000) | list }}',
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    '{{ raise_exception("roles must alternate") }}',
    '{{ messages[7].content }}',
    '{{ 1 / 0 }}',
  ],
)
def test_what_a_template_may_not_do_is_an_answer_of_400(source: str):
  with pytest.raises(Refusal) as refused:
    render(source)
  assert refused.value.status == 400
  assert len(MESSAGES) == 2


@pytest.mark.parametrize(
  'source', ["{{ '{0.__class__.__init__}'.format(messages) }}", "{{ ('a' | upper).__class__ }}"]
)
def test_private_attributes_print_as_nothing(source: str):
  assert render(source) == ''


def test_a_template_can_refuse_in_words():
  with pytest.raises(Refusal, match='roles must alternate'):
    render('{{ raise_exception("roles must alternate") }}')


def test_a_broken_template_is_found_at_the_start():
  with pytest.raises(UserError, match='is not Jinja'):
    ChatTemplate('{% for %}', where='x')


@pytest.mark.parametrize('content', ['{bad', '[]', '[' * 100_000, 'é'.encode('latin-1')])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str | bytes):
  path = tmp_path / 'tokenizer_config.json'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=r'tokenizer_config.json is not (valid JSON|a JSON object)'):
    load_chat_template(None, tokenizer_folder=tmp_path)


def test_where_templates_come_from(tmp_path: Path):
  assert load_chat_template(None, tokenizer_folder=tmp_path).stops == ('\nUser:', '\nSystem:')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': 'config'}))
  assert load_chat_template(None, tokenizer_folder=tmp_path).render([]) == 'config'
  (tmp_path / 'chat_template.jinja').write_text('file')
  assert load_chat_template(None, tokenizer_folder=tmp_path).render([]) == 'file'
  (tmp_path / 'mine').write_text('mine')
  assert load_chat_template(str(tmp_path / 'mine'), tokenizer_folder=tmp_path).render([]) == 'mine'
  with pytest.raises(UserError, match='cannot be read'):
    load_chat_template(str(tmp_path / 'absent'), tokenizer_folder=tmp_path)
