"""What thinkers of a group are told: a file of texts with places to fill in."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import tomllib
from pathlib import Path

from exitax.errors import UserError

_FIELDS = ('prompt', 'header', 'answer')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkTemplate:
  """What thinkers are told; `{problem}`, `{thinkers}` and `{thinker}` are filled in.

  Attributes:
    prompt: read by all, once.
    header: begins each thinker's text.
    answer: begins the answer.
  """

  prompt: str
  header: str
  answer: str

  @classmethod
  def read(cls, path: str | os.PathLike[str] | None = None) -> ThinkTemplate:
    """From a TOML file; None takes the one that comes with exitax, in the paper's manner.

    Raises:
      UserError: no such file, no TOML, or a field that is missing or unknown.
    """
    where = 'think.toml' if path is None else os.fspath(path)
    try:
      if path is None:
        text = importlib.resources.files('exitax.data').joinpath(where).read_text('utf-8')
      else:
        text = Path(path).read_text(encoding='utf-8')
      values = tomllib.loads(text)
    except OSError as error:
      raise UserError(f'template={where} cannot be read ({error.strerror})') from None
    except ValueError as error:
      raise UserError(f'template={where} is not TOML ({error}): mend it') from None
    wrong = [name for name in _FIELDS if not isinstance(values.get(name), str)]
    wrong += [name for name in values if name not in _FIELDS]
    if wrong:
      raise UserError(
        f'template={where}: {wrong[0]} is missing, unknown or no text: give {", ".join(_FIELDS)}, all texts'
      )
    return cls(**values)

  def filled(self, part: str, *, problem: str, thinkers: int, thinker: int = 0) -> str:
    """One of the texts with the places filled in."""
    text = getattr(self, part)
    for name, value in (('{thinkers}', thinkers), ('{thinker}', thinker + 1)):
      text = text.replace(name, str(value))
    return text.replace('{problem}', problem)  # Last: a problem may have braces of its own.
