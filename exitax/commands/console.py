"""Standard output (or error) of commands."""

from __future__ import annotations

from rich.console import Console


class CommandConsole(Console):
  """Text as it is, in colour on a terminal: numbers are not picked out, lines are not broken."""

  def __init__(self, *, stderr: bool = False, soft_wrap: bool = True) -> None:
    super().__init__(highlight=False, soft_wrap=soft_wrap, stderr=stderr)

  def on_broken_pipe(self) -> None:
    """Goes on with the error, which `ending.report` knows; rich would end with status 1."""
    raise  # It is being handled where this is called.
