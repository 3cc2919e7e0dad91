"""Where a run's parameters start: another model's, with exits that it may not have had."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp

from exitax.checkpoint import LoadedModel
from exitax.errors import UserError
from exitax.layers import HeadKind, merge_lora
from exitax.models import ExitConfig, ExitLM, ExitMatrix, Params
from exitax.parallel import path_name
from exitax.training.trained import Trained, join_trained, split_trained


class InitialExits(enum.Enum):
  """How exits start that the initial model does not have."""

  RANDOM = 'random'
  # EE-Tuning (arXiv 2402.00518, section 2.1): norm and matrix of the final head, the MLP of the layer
  # before the exit, the last layer for a LAYER head.
  COPY = 'copy'


def initial_params(
  model: ExitLM, fresh: Params, source: LoadedModel, exits: InitialExits
) -> Params:
  """`fresh` parameters with the backbone of another model, and the exits that both have.

  Adapters start as they do in `fresh`: adding nothing.

  Args:
    model: the model to train.
    fresh: its parameters at random, in their shardings; they decide formats.
    source: the model to start from.
    exits: how the others start.

  Raises:
    UserError: backbones of different shapes.
  """
  # A source's own adapters become part of what is frozen.
  merged = merge_lora(source.params, source.model.config.lora)
  if exits is InitialExits.COPY:
    fresh = join_trained(copied_exits(model, fresh, merged), fresh)
  adapters, rest = split_trained(fresh, Trained.LORA)
  own, backbone = split_trained(rest, Trained.EXITS)
  of_source, source_backbone = split_trained(merged, Trained.EXITS)
  _check_same(backbone, source_backbone, where=str(source.directory))
  backbone = jax.tree.map(_like, backbone, source_backbone)
  common = set(model.config.exits) & set(source.model.config.exits)
  kept = {
    str(item.layer): jax.tree.map(
      _like, own['exits'][str(item.layer)], of_source['exits'][str(item.layer)]
    )
    for item in common
    if str(item.layer) in own.get('exits', {})
  }
  if 'exits' in own:
    own = {**own, 'exits': {**own['exits'], **kept}}
  if 'shared_exit' in own and 'shared_exit' in of_source:
    own = {**own, 'shared_exit': jax.tree.map(_like, own['shared_exit'], of_source['shared_exit'])}
  return join_trained(adapters, join_trained(own, backbone))


def copied_exits(model: ExitLM, fresh: Params, source: Params) -> Params:
  """Parameters of all exits out of a model's other parts, in the shardings and formats of `fresh`."""
  final = source['embed' if model.config.tie_embeddings else 'head']
  exits = {}
  for item in model.config.exits:
    copied: Params = {}
    if item.head is not HeadKind.EMBEDDING:
      copied['head'] = _copied_head(item, source)
    if item.matrix is ExitMatrix.OWN:
      copied['matrix'] = final['matrix']
    if copied:
      exits[str(item.layer)] = copied
  wanted, _ = split_trained(fresh, Trained.EXITS)
  found: Params = {'exits': exits} if exits else {}
  if 'shared_exit' in wanted:
    found['shared_exit'] = {'matrix': final['matrix']}
  return jax.tree.map(_like, wanted, found)


def _copied_head(item: ExitConfig, source: Params) -> Params:
  head: Params = {'norm': source['norm']}
  match item.head:
    case HeadKind.MLP:
      before = jax.tree.map(lambda x: x[item.layer - 1], source['blocks'])
      head |= {'mlp': before['mlp'], 'mlp_norm': before['mlp_norm']}
    case HeadKind.LAYER:
      head['block'] = jax.tree.map(lambda x: x[-1], source['blocks'])
  return head


def _like(own: jax.Array, new: jax.Array) -> jax.Array:
  """`new` in the format and the sharding of `own`: a copy, since both trees may be donated."""
  return jax.device_put(jnp.array(new, own.dtype), own.sharding)


def _check_same(own: Any, found: Any, *, where: str) -> None:
  shapes = {path_name(path): x.shape for path, x in jax.tree.leaves_with_path(own)}
  others = {path_name(path): x.shape for path, x in jax.tree.leaves_with_path(found)}
  if shapes != others:
    path = next(p for p in [*shapes, *others] if shapes.get(p) != others.get(p))
    raise UserError(
      f'initial_checkpoint={where} holds a model of another shape ({path} is {others.get(path)} '
      f'there, {shapes.get(path)} here): use its ModelConfig, or train from scratch'
    )
