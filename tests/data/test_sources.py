from __future__ import annotations

import itertools

import pytest

from exitax import data
from exitax.data.sources import cut_text
from exitax.errors import UserError


def test_python_library_is_real_text_without_tests():
  documents = list(data.PythonLibrarySource().documents())
  names = [document.name for document in documents]
  assert len(names) > 400 and sum(len(d.text) for d in documents) > 8_000_000
  assert names == sorted(names) and len(set(names)) == len(names)
  assert {'argparse.py', 'json/decoder.py'} <= set(names)
  folders = set(itertools.chain.from_iterable(name.split('/')[:-1] for name in names))
  assert not folders & {'test', 'tests', 'idle_test', 'site-packages'}
  assert 'def loads(' in documents[names.index('json/__init__.py')].text


def test_python_library_can_be_cut_short():
  short = list(data.PythonLibrarySource(max_files=3).documents())
  assert len(short) == 3
  assert short == list(itertools.islice(data.PythonLibrarySource().documents(), 3))


def test_text_from_files_folders_and_globs(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'b.txt').write_text('bee')
  (tmp_path / 'a.txt').write_text('\ufeffay é', encoding='utf-8')
  (tmp_path / 'sub' / 'c.md').write_text('sea')
  (tmp_path / '.hidden').write_bytes(b'\xff')

  def texts(*paths: str) -> list[str]:
    source = data.TextSource(tuple(str(tmp_path / path) for path in paths))
    return [document.text for document in source.documents()]

  assert texts('') == ['ay é', 'bee', 'sea']
  assert texts('b.txt', '') == ['bee', 'ay é', 'sea']
  assert texts('*.txt') == ['ay é', 'bee']
  assert texts('**/*.md') == ['sea']
  assert data.TextSource(str(tmp_path)).paths == (str(tmp_path),)


def test_long_text_is_cut_at_blank_lines(tmp_path):
  paragraphs = [f'paragraph {i}\n{"x" * 50}\n\n' for i in range(40)]
  (tmp_path / 'book.txt').write_text(''.join(paragraphs))
  source = data.TextSource((str(tmp_path),), document_bytes=400)
  documents = list(source.documents())
  assert ''.join(d.text for d in documents) == ''.join(paragraphs)
  assert len(documents) > 5
  assert all(len(d.text) <= 400 and d.text.endswith('\n\n') for d in documents)
  assert documents[1].name == f'{tmp_path}/book.txt#1'


def test_cut_text_falls_back_to_lines_and_keeps_a_long_line():
  assert cut_text('aaaa\nbbbb\ncccc\n', max_bytes=10) == ['aaaa\nbbbb\n', 'cccc\n']
  assert cut_text('éééé\nb\n', max_bytes=4) == ['éééé\n', 'b\n']
  assert cut_text('aaaa\nbbbb\n', max_bytes=0) == ['aaaa\nbbbb\n']


@pytest.mark.parametrize(
  ('content', 'message'),
  [(b'abc\xff', r'bad\.txt is not UTF-8 text: bad byte at 3'), (b'a\0b', r'bad\.txt is not text')],
)
def test_file_that_is_not_text(tmp_path, content, message):
  (tmp_path / 'bad.txt').write_bytes(content)
  with pytest.raises(UserError, match=message):
    list(data.TextSource((str(tmp_path),)).documents())


def test_path_that_matches_nothing(tmp_path):
  with pytest.raises(UserError, match=r"no file at '.*nothing\*'"):
    list(data.TextSource((str(tmp_path / 'nothing*'),)).documents())


def test_empty_corpus(tmp_path):
  (tmp_path / 'blank.txt').write_text(' \n\n')
  with pytest.raises(UserError, match='empty corpus'):
    data.read_documents(data.TextSource((str(tmp_path),)))


def test_digest_follows_texts_and_order_not_names():
  a, b = data.Document(name='a', text='x'), data.Document(name='b', text='yz')
  digest = data.corpus_digest([a, b])
  assert digest == data.corpus_digest([data.Document(name='c', text='x'), b])
  assert len({digest, data.corpus_digest([b, a]), data.corpus_digest([a])}) == 3
  moved = [data.Document(name='a', text='xy'), data.Document(name='b', text='z')]
  assert data.corpus_digest(moved) != digest
