from __future__ import annotations

import json

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from exitax import data
from exitax.data import tokenizers
from exitax.errors import UserError

CORPUS = [
  'def loads(text):\n  return decoder.decode(text)\n' * 5,
  'Größe, 大きさ, 🙂 and spaces   x',
]
ANY_TEXT = st.text(max_size=60) | st.text('aé大🙂 \n\u0301', max_size=20)


@pytest.fixture(scope='module')
def bpe() -> data.BpeTokenizer:
  return data.BpeTokenizer.train(CORPUS, vocab_size=300)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_bytes_round_trip(text):
  tokenizer = data.ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids == list(text.encode())
  assert tokenizer.decode(ids) == text


def test_bpe_round_trip(bpe):
  @settings(max_examples=150, deadline=None)
  @given(text=ANY_TEXT)
  def check(text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(2 < i < bpe.vocab_size for i in ids)

  check()


def test_bpe_learns_the_corpus_and_is_deterministic(bpe):
  assert bpe.vocab_size == 300
  assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 2
  assert data.BpeTokenizer.train(CORPUS, vocab_size=300).digest == bpe.digest
  assert data.BpeTokenizer.train(CORPUS, vocab_size=290).digest != bpe.digest


def test_encode_batch_equals_encode(bpe):
  for tokenizer in (bpe, data.ByteTokenizer()):
    assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]


def test_special_tokens_are_distinct_silent_and_never_come_from_text(bpe):
  for tokenizer in (bpe, data.ByteTokenizer()):
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert len(set(specials)) == 3 and max(specials) < tokenizer.vocab_size
    assert tokenizer.decode([*specials, *tokenizer.encode('x'), *specials]) == 'x'
    assert not set(tokenizer.encode('<|eos|><|bos|><|pad|>')) & set(specials)
    assert tokenizer.decode(tokenizer.encode('<|eos|>')) == '<|eos|>'


def test_small_corpus_gives_a_smaller_vocabulary():
  assert data.BpeTokenizer.train(['ab'], vocab_size=4096).vocab_size == 260


def test_saved_tokenizer_is_the_same(bpe, tmp_path):
  for name, tokenizer in [('bpe', bpe), ('bytes', data.ByteTokenizer())]:
    tokenizer.save(tmp_path / name)
    loaded = data.load_tokenizer(tmp_path / name)
    assert type(loaded) is type(tokenizer)
    assert loaded.digest == tokenizer.digest
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (
      tokenizer.bos_id,
      tokenizer.eos_id,
      tokenizer.pad_id,
    )
    assert loaded.encode('Größe <|eos|>') == tokenizer.encode('Größe <|eos|>')
    info = json.loads((tmp_path / name / 'exitax_tokenizer.json').read_text())
    assert info['kind'] == name and info['digest'] == tokenizer.digest
  again = data.load_tokenizer(tmp_path / 'bpe' / 'tokenizer.json')
  assert isinstance(again, data.BpeTokenizer) and again.digest == bpe.digest


def test_any_hugging_face_file(bpe, tmp_path):
  bpe.save(tmp_path / 'ours')
  definition = json.loads((tmp_path / 'ours' / 'tokenizer.json').read_text())
  for added in definition['added_tokens']:
    added['content'] = {'<|eos|>': '<|endoftext|>', '<|bos|>': '<|odd|>'}.get(
      added['content'], added['content']
    )
  vocabulary = definition['model']['vocab']
  vocabulary['<|endoftext|>'] = vocabulary.pop('<|eos|>')
  vocabulary['<|odd|>'] = vocabulary.pop('<|bos|>')
  path = tmp_path / 'theirs' / 'tokenizer.json'
  path.parent.mkdir()
  path.write_text(json.dumps(definition))

  tokenizer = data.load_tokenizer(path)
  assert isinstance(tokenizer, data.HuggingFaceTokenizer)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 0)
  assert tokenizers.start_id(tokenizer) == 2
  assert data.encode_prompt(tokenizer, 'def') == [2, *bpe.encode('def')]
  assert tokenizer.encode('<|endoftext|>') == [2]
  assert tokenizer.digest != bpe.digest
  assert data.load_tokenizer(path.parent).digest == tokenizer.digest

  config = {'bos_token': {'content': '<|odd|>'}, 'eos_token': '<|pad|>', 'pad_token': None}
  (path.parent / 'tokenizer_config.json').write_text(json.dumps(config))
  named = data.load_tokenizer(path)
  assert (named.bos_id, named.eos_id) == (1, 0)
  assert data.HuggingFaceTokenizer.from_file(path, eos_token='<|odd|>').eos_id == 1
  named.save(tmp_path / 'kept')
  kept = data.load_tokenizer(tmp_path / 'kept')
  assert (kept.digest, kept.bos_id, kept.eos_id) == (named.digest, 1, 0)


def test_prompt_begins_like_a_document():
  tokenizer = data.ByteTokenizer()
  assert data.encode_prompt(tokenizer, 'a') == [256, 97]
  stream = data.token_stream([tokenizer.encode('a')], tokenizer=tokenizer)
  assert list(stream.tokens) == [256, 97, 257]


def test_tokenizer_that_does_not_match_the_checkpoint(bpe):
  data.check_tokenizer(bpe, expected_digest=bpe.digest)
  with pytest.raises(UserError, match=rf'tokenizer {bpe.digest[:12]} .*does not match .*/runs/a'):
    data.check_tokenizer(bpe, expected_digest='0' * 64, where='/runs/a')


def test_changed_or_damaged_folders(bpe, tmp_path):
  bpe.save(tmp_path)
  definition = (tmp_path / 'tokenizer.json').read_text()
  info = (tmp_path / 'exitax_tokenizer.json').read_text()
  cases = [
    ('tokenizer.json', definition + ' ', 'was changed since it was saved'),
    ('tokenizer.json', definition[:100], 'not a tokenizer.json'),
    ('exitax_tokenizer.json', info[:20], 'is damaged'),
    ('exitax_tokenizer.json', '[]', 'is damaged'),
    ('exitax_tokenizer.json', '{"kind": "bpe"}', 'is damaged: no'),
    ('exitax_tokenizer.json', '{"kind": "odd"}', "unknown kind 'odd'"),
  ]
  for name, content, message in cases:
    bpe.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
      data.load_tokenizer(tmp_path)
  bpe.save(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match=r'cannot read .*tokenizer\.json'):
    data.load_tokenizer(tmp_path)


def test_files_that_are_no_tokenizer(tmp_path):
  with pytest.raises(UserError, match='no tokenizer at'):
    data.load_tokenizer(tmp_path / 'missing')
  with pytest.raises(UserError, match='no tokenizer at'):
    data.load_tokenizer(tmp_path)
  path = tmp_path / 'tokenizer.json'
  path.write_text('{}')
  with pytest.raises(UserError, match=r'is not a tokenizer\.json'):
    data.load_tokenizer(path)
  path.write_bytes(b'\xff\xfe')
  with pytest.raises(UserError, match='is not UTF-8'):
    data.load_tokenizer(path)


def test_no_end_token(tmp_path):
  tokenizer = hf.Tokenizer(hf.models.WordLevel({'a': 0, '[X]': 1}, unk_token='[X]'))
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(UserError, match=r'names no end token .*pass eos_token='):
    data.load_tokenizer(tmp_path)
  with pytest.raises(UserError, match="has no end token 'b'"):
    data.HuggingFaceTokenizer.from_file(tmp_path / 'tokenizer.json', eos_token='b')


def test_vocabulary_too_small():
  with pytest.raises(UserError, match='vocab_size=258 is below 259'):
    data.BpeTokenizer.train(CORPUS, vocab_size=258)


def test_lone_surrogate(bpe):
  for tokenizer in (bpe, data.ByteTokenizer()):
    for call in (tokenizer.encode, lambda text, t=tokenizer: t.encode_batch([text])):
      with pytest.raises(UserError, match='at 1, which is no character'):
        call('a\udc80')
