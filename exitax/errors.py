"""Errors that a user can cause and mend.

Every folder may raise them; only `exitax.commands` turns them into one line on standard error and
exit status 2.
"""

from __future__ import annotations


class UserError(Exception):
  """Input or surroundings that the user can put right: the message names value, limit and fix."""
