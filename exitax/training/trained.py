"""Which parameters a run trains, and how a frozen model is told apart from what is tuned on it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from exitax.layers import LORA_LEAVES
from exitax.models import ModelConfig, Params

_OF_EXITS = ('exits', 'shared_exit')


class Trained(enum.Enum):
  """Parts of the parameters that the optimizer changes; all others are frozen, bit for bit."""

  ALL = 'all'
  # The exits' heads and their own or shared matrices (EE-Tuning, arXiv 2402.00518). The backbone runs up
  # to the last exit and no further, forwards only.
  EXITS = 'exits'
  # The adapters of `ModelConfig.lora` (arXiv 2106.09685), with the exits or without.
  LORA = 'lora'
  LORA_AND_EXITS = 'lora_and_exits'

  @property
  def exits(self) -> bool:
    """Whether the exits are trained."""
    return self is not Trained.LORA

  @property
  def lora(self) -> bool:
    """Whether the adapters are; they are part of everything, where there are any."""
    return self is not Trained.EXITS


def split_trained(params: Params, trained: Trained) -> tuple[Params, Params]:
  """Trained and frozen parts of the parameters: nested dictionaries of the leaves that each has."""
  if trained is Trained.ALL:
    return params, {}
  return (
    _select(params, lambda path: _is_trained(path, trained)),
    _select(params, lambda path: not _is_trained(path, trained)),
  )


def join_trained(of_trained: Params, frozen: Params) -> Params:
  """Inverse of `split_trained`; where both have a leaf, the first one's."""
  joined = dict(frozen)
  for name, part in of_trained.items():
    both = isinstance(part, dict) and isinstance(joined.get(name), dict)
    joined[name] = join_trained(part, joined[name]) if both else part
  return joined


def trained_depth(config: ModelConfig, trained: Trained) -> int | None:
  """Layers that training runs; None for all and the final head."""
  return config.exits[-1].layer if trained is Trained.EXITS else None


def _is_trained(path: tuple[str, ...], trained: Trained) -> bool:
  if path[0] in _OF_EXITS:
    return trained.exits
  return path[-1] in LORA_LEAVES and trained.lora


def _select(
  node: Any, wanted: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> Any:
  """The leaves whose path is wanted, and no empty branches."""
  kept = {}
  for name, item in node.items():
    if isinstance(item, dict):
      if part := _select(item, wanted, (*path, name)):
        kept[name] = part
    elif wanted((*path, name)):
      kept[name] = item
  return kept
