"""The error of this folder."""

from __future__ import annotations

from exitax.errors import UserError


class CheckpointError(UserError):
  """A checkpoint is missing, damaged, does not fit, or could not be written."""
