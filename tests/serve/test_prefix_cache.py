"""Longest common prefixes in whole chunks, and bounded bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from exitax.serve.prefix_cache import PrefixCache


def make(max_chunks: int = 8) -> PrefixCache[tuple[int, ...]]:
  return PrefixCache(chunk=2, chunk_bytes=10, max_bytes=10 * max_chunks + 5)


def put(cache: PrefixCache[tuple[int, ...]], tokens) -> list[int]:
  """Stores each chunk as the tokens up to its end; returns which were read."""
  read = []

  def chunk(number: int) -> tuple[int, ...]:
    read.append(number)
    return tuple(tokens[: 2 * number + 2])

  cache.store(tokens, chunk)
  return read


def test_the_miniature_of_the_file():
  cache = make()
  put(cache, [1, 2, 3, 4, 5])
  assert cache.find([1, 2, 3, 4, 5]) == [(1, 2), (1, 2, 3, 4)]
  assert cache.find([1, 2, 9, 9]) == [(1, 2)]
  assert cache.find([3, 4, 1, 2]) == []
  assert cache.find([1]) == []


def test_known_chunks_are_not_read_again():
  cache = make()
  assert put(cache, [1, 2, 3, 4]) == [0, 1]
  assert put(cache, [1, 2, 5, 6]) == [1]


def test_the_least_recently_used_goes_and_never_before_its_followers():
  cache = make(3)
  put(cache, [1, 2, 3, 4])
  put(cache, [7, 8])
  cache.find([1, 2])
  put(cache, [9, 9])
  assert len(cache.find([1, 2, 3, 4])) == 1
  assert cache.find([7, 8]) == [(7, 8)]


def test_nothing_is_kept_without_bytes():
  cache = make(0)
  assert put(cache, [1, 2]) == []
  assert cache.find([1, 2]) == []


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=12), st.integers(0, 5))
def test_what_is_found_is_a_prefix_and_the_bytes_are_bounded(prompts, max_chunks):
  cache = make(max_chunks)
  for prompt in prompts:
    for number, chunk in enumerate(cache.find(prompt)):
      assert chunk == tuple(prompt[: 2 * number + 2])
    put(cache, prompt)
    assert cache.num_bytes <= 10 * max_chunks
    assert len(cache.find(prompt)) == min(len(prompt) // 2, max_chunks)
