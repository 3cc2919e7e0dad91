from __future__ import annotations

import random

import numpy as np
import pytest

from exitax import data
from exitax.data.splits import ShingleIndex, choose_held_out, shingle_hashes, text_rank
from exitax.errors import UserError

WORDS = [f'word{i}' for i in range(500)]


def _documents(count: int, *, words: int = 60, seed: int = 0) -> list[data.Document]:
  rng = random.Random(seed)
  return [
    data.Document(name=f'd{i}', text=' '.join(rng.choices(WORDS, k=words))) for i in range(count)
  ]


def _split(documents, **settings) -> data.Split:
  [split] = data.split_documents([documents], config=data.SplitConfig(**settings))
  return split


def test_parts_are_disjoint_and_complete_and_near_the_fraction():
  documents = _documents(1000)
  split = _split(documents, fraction=0.1)
  assert not split.dropped
  assert set(split.train) | set(split.held_out) == set(documents)
  assert not set(split.train) & set(split.held_out)
  assert 70 <= len(split.held_out) <= 130  # 100 expected, standard deviation 9.5.


def test_choice_depends_on_the_text_alone():
  documents = _documents(300)
  held_out = set(_split(documents).held_out)
  assert set(_split(documents[::-1]).held_out) == held_out
  assert set(_split(documents[:200]).held_out) == held_out & set(documents[:200])
  renamed = [data.Document(name='x', text=d.text) for d in documents]
  assert {d.text for d in _split(renamed).held_out} == {d.text for d in held_out}


def test_exact_copies_never_stand_on_both_sides():
  documents = _documents(200)
  split = _split(documents + documents, fraction=0.2)
  assert not {d.text for d in split.train} & {d.text for d in split.held_out}
  assert not split.dropped


def _near_to(document: data.Document, split_fraction: float) -> data.Document:
  """The same words but one, with a hash that puts it into training."""
  words = document.text.split()
  for i in range(1000):
    text = ' '.join([*words[:-1], f'changed{i}'])
    if text_rank(text) > split_fraction:
      return data.Document(name='near', text=text)
  raise AssertionError


def test_near_duplicate_of_a_held_out_document_is_dropped():
  documents = _documents(200)
  copied = _split(documents).held_out[0]
  near = _near_to(copied, 0.05)
  split = _split([*documents, near])
  assert split.dropped == (near,)
  assert near not in split.train and copied in split.held_out
  assert near in _split([*documents, near], similarity=1.0).train


def test_held_out_document_quoted_in_a_longer_one_is_found():
  documents = _documents(200)
  copied = _split(documents).held_out[0]
  filler = _documents(1, words=2000, seed=9)[0].text
  quoting = [
    data.Document(name='quoting', text=f'{filler[:5000]} x{i} {copied.text.upper()}\n\n{filler}')
    for i in range(30)
  ]
  quoting = [d for d in quoting if text_rank(d.text) > 0.05][:1]
  assert _split([*documents, *quoting]).dropped == tuple(quoting)


def test_near_duplicates_are_found_across_corpora():
  documents = _documents(200)
  near = _near_to(_split(documents).held_out[0], 0.05)
  other = [*_documents(50, seed=5), near]
  first, second = data.split_documents([documents, other], config=data.SplitConfig())
  assert not first.dropped
  assert second.dropped == (near,)


def test_similarity_equals_the_overlap_of_sets_of_shingles():
  config = data.SplitConfig(shingle_words=3)
  rng = random.Random(1)
  texts = [' '.join(rng.choices('abc', k=rng.randint(1, 40))) for _ in range(40)]

  def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    span = min(3, len(words))
    return {tuple(words[i : i + span]) for i in range(len(words) - span + 1)}

  indexed, asked = texts[:20], texts[20:]
  index = ShingleIndex([data.Document(name='', text=t) for t in indexed], config=config)
  for text in asked:
    a = shingles(text)
    expected = max(len(a & shingles(b)) / min(len(a), len(shingles(b))) for b in indexed)
    assert index.similarity(text) == pytest.approx(expected, abs=1e-12)


def test_shingles_ignore_case_and_space_but_not_order():
  one = shingle_hashes('a b c, d', shingle_words=2)
  np.testing.assert_array_equal(one, shingle_hashes('A  b\nC , D', shingle_words=2))
  assert len(one) == 4
  assert not np.array_equal(one, shingle_hashes('b a c , d', shingle_words=2))


def test_few_documents_still_give_both_parts():
  for seed in range(20):
    split = _split(_documents(2, seed=seed))
    assert len(split.train) == len(split.held_out) == 1
    split = _split(_documents(3, seed=seed), fraction=0.999)
    assert len(split.train) >= 1 and len(split.held_out) >= 1


def test_fraction_zero_holds_nothing_out():
  documents = _documents(3)
  split = _split(documents, fraction=0)
  assert split.train == tuple(documents) and not split.held_out


def test_bad_input():
  [one] = _documents(1)
  with pytest.raises(UserError, match=r'1 different document\(s\) cannot be split'):
    choose_held_out([one, one], fraction=0.05)
  words = _documents(1)[0].text
  pair = [data.Document(name='a', text=words + ' x'), data.Document(name='b', text=words + ' y')]
  with pytest.raises(UserError, match='near-duplicates of held-out'):
    _split(pair)
  for settings, message in [
    ({'fraction': 1.0}, 'fraction=1.0'),
    ({'fraction': -0.1}, 'fraction=-0.1'),
    ({'similarity': 0.0}, 'similarity=0.0'),
    ({'shingle_words': 0}, 'shingle_words=0'),
  ]:
    with pytest.raises(UserError, match=message):
      data.SplitConfig(**settings)
