from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from exitax import data


def test_miniature():
  stream = data.StreamDecoder(data.ByteTokenizer())
  assert [stream.push(i) for i in 'cé'.encode()] == ['c', '', 'é']
  assert stream.finish() == ''


@pytest.fixture(scope='module')
def bpe() -> data.BpeTokenizer:
  return data.BpeTokenizer.train(['the theme of a theatre 大きさ' * 4], vocab_size=280)


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_pieces_join_to_the_text_and_hold_no_half_character(kind, bpe):
  tokenizer = bpe if kind == 'bpe' else data.ByteTokenizer()

  @settings(max_examples=200, deadline=None)
  @given(text=st.text('the 大é🙂\n', max_size=30))
  def check(text):
    stream = data.StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert '\ufffd' not in ''.join(pieces)
    assert ''.join(pieces) == text
    assert stream.finish() == ''

  check()


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 257) | st.sampled_from([0xC3, 0xA9, 0xF0, 0x9F]), max_size=20))
def test_any_ids_join_to_their_decoding(ids):
  """Broken bytes and special ids too: nothing is lost, nothing is shown twice."""
  tokenizer = data.ByteTokenizer()
  stream = data.StreamDecoder(tokenizer)
  text = ''.join([*(stream.push(i) for i in ids), stream.finish()])
  assert text == tokenizer.decode(ids)


def test_unfinished_character_comes_out_at_the_end():
  stream = data.StreamDecoder(data.ByteTokenizer())
  assert [stream.push(i) for i in (97, 0xF0, 0x9F)] == ['a', '', '']
  assert stream.finish() == '\ufffd'
  assert stream.push(98) == 'b'


def test_leading_space_dropped_by_the_tokenizer_is_kept_between_pieces(tmp_path):
  """A tokenizer like Llama 2's: words carry `▁`, and decoding strips the first space."""
  vocabulary = {'▁a': 0, '▁b': 1, '</s>': 2, '<0xC3>': 3, '<0xA9>': 4}
  model = tokenizers.models.WordLevel(vocabulary, unk_token='</s>')
  library = tokenizers.Tokenizer(model)
  library.add_special_tokens(['</s>'])
  library.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace('▁', ' '),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(' ', 1, 0),
    ]
  )
  library.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = data.load_tokenizer(tmp_path)
  stream = data.StreamDecoder(tokenizer)
  assert [stream.push(i) for i in (0, 1, 3, 4, 0, 2)] == ['a', ' b', '', 'é', ' a', '']
