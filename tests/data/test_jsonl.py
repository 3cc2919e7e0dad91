from __future__ import annotations

import json

import pytest

from exitax import data
from exitax.errors import UserError


def test_reads_lines_in_order(tmp_path):
  lines = [json.dumps({'id': i, 'body': f'text {i} é'}) for i in range(3)]
  (tmp_path / 'a.jsonl').write_text('\n\n'.join(lines) + '\n')
  (tmp_path / 'ignored.txt').write_text('not json')
  documents = list(data.JsonlSource((str(tmp_path),), field='body').documents())
  assert [d.text for d in documents] == ['text 0 é', 'text 1 é', 'text 2 é']
  assert documents[1].name == f'{tmp_path}/a.jsonl:3'


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"text": ', r'not JSON \(.* at column 10\)'),
    (b'["text"]', r"a JSON list, need an object with 'text'"),
    (b'{"body": "x", "id": 1}', r"no field 'text' \(fields: 'body', 'id'\)"),
    (b'{"text": 3}', r"field 'text' is int, need a string"),
    (b'{"text": "\xff"}', r'not UTF-8 \(byte 10\)'),
    (b'{"text": "\\ud800"}', r'lone surrogate'),
    (b'{"text": ' + b'1' * 5000 + b'}', r'not readable as JSON'),
    (b'[' * 100_000, r'not readable as JSON'),
  ],
)
def test_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "good"}\n' + line + b'\n')
  with pytest.raises(UserError, match=rf'a\.jsonl:2: .*{message}'):
    list(data.JsonlSource(str(path)).documents())


def test_folder_without_jsonl(tmp_path):
  with pytest.raises(UserError, match=r'no \*\.jsonl file at'):
    list(data.JsonlSource(str(tmp_path)).documents())
