"""Errors that a user can cause and mend.

Every folder may raise them; only `exitax.commands` turns them into one line on standard error and
exit status 2.
"""

from __future__ import annotations

import enum
from typing import TypeVar


class UserError(Exception):
  """Input or surroundings that the user can put right: the message names value, limit and fix."""


_Choice = TypeVar('_Choice', bound=enum.Enum)


def choose(kind: type[_Choice], value: _Choice | str, *, name: str) -> _Choice:
  """The member of `kind` that `value` is or, as configuration files write it, names.

  Args:
    kind: the enumeration; its values are strings.
    value: a member or a member's value.
    name: what the value is called in the configuration, for the message.

  Raises:
    UserError: no such member; lists those that there are.
  """
  try:
    return kind(value)
  except ValueError:
    known = ', '.join(repr(member.value) for member in kind)
    raise UserError(f'{name}={value!r} is not known: choose {known}') from None
