"""How commands end: one line for a mistake in the flags, nothing for a reader that has enough."""

from __future__ import annotations

import io

import pytest

from exitax.commands.console import CommandConsole
from tests.commands.conftest import RunCommand
from tests.commands.test_bad_input import assert_one_line


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (('generate', '--promt=a'), 'unrecognized arguments: --promt=a; see exitax generate --help'),
    (('generate', '--top_k=x'), "--top_k: invalid int value: 'x'; see exitax generate --help"),
    (('convert', 'to-hf'), 'required: CHECKPOINT, OUT; see exitax convert to-hf --help'),
  ],
)
def test_flags_that_are_none(exitax: RunCommand, argv: tuple[str, ...], message: str) -> None:
  assert_one_line(exitax(*argv), message)


class Closed(io.StringIO):
  """A pipe that nobody reads."""

  def write(self, text: str) -> int:
    raise BrokenPipeError


def test_a_reader_that_has_enough_is_no_failure() -> None:
  console = CommandConsole()
  console.file = Closed()
  with pytest.raises(BrokenPipeError):  # Which `ending.report` turns into status 0.
    console.print('text')
