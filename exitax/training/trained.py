"""Which parameters a run trains, and how a frozen model is told apart from what is tuned on it."""

from __future__ import annotations

import enum
from typing import Any

from exitax.models import ModelConfig, Params

_OF_EXITS = ('exits', 'shared_exit')


class Trained(enum.Enum):
  """Parts of the parameters that the optimizer changes; all others are frozen, bit for bit."""

  ALL = 'all'
  # The exits' heads and their own or shared matrices (EE-Tuning, arXiv 2402.00518). The backbone runs up
  # to the last exit and no further, forwards only.
  EXITS = 'exits'


def split_trained(params: Any, trained: Trained) -> tuple[Any, Any]:
  """Trained and frozen parts of a tree whose top level is that of the parameters."""
  if trained is Trained.ALL:
    return params, {}
  of_exits = {name: part for name, part in params.items() if name in _OF_EXITS}
  return of_exits, {name: part for name, part in params.items() if name not in of_exits}


def join_trained(of_trained: Params, frozen: Params) -> Params:
  """Inverse of `split_trained`."""
  return {**frozen, **of_trained}


def trained_depth(config: ModelConfig, trained: Trained) -> int | None:
  """Layers that training runs; None for all and the final head."""
  return None if trained is Trained.ALL else config.exits[-1].layer
