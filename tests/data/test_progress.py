from __future__ import annotations

import io
import sys

from exitax import data


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def test_bar_passes_items_on_and_writes_to_a_terminal_only(monkeypatch):
  for stream, shows in ((Terminal(), True), (io.StringIO(), False)):
    monkeypatch.setattr(sys, 'stderr', stream)
    assert list(data.progress_bar(range(5), total=5, label='counting')) == list(range(5))
    assert ('counting' in stream.getvalue()) == shows


def test_without_rich_it_is_quiet(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  monkeypatch.setitem(sys.modules, 'rich.progress', None)
  assert list(data.progress_bar([1, 2], total=2, label='x')) == [1, 2]
  assert sys.stderr.getvalue() == ''
  assert list(data.quiet([1, 2], total=2, label='x')) == [1, 2]
