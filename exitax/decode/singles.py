"""Texts that have a row of a state of groups to themselves, decoded as rows without groups.

A single request among groups is a group of one, and its row holds what an ordinary row would: column
i has position i, all before it are seen. Such rows are taken out, run through the same loop under any plan
(speculation too, which groups have no use for), and put back as if groups had never been left. Only what is
kept per text moves; the cache stays where it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.compiling import decode_jit
from exitax.decode.lanes import Causal, KeyColumns
from exitax.decode.loop import run_steps
from exitax.decode.plan import StepPlan
from exitax.decode.state import DecodeState
from exitax.decode.texts import Grouping
from exitax.layers import PROMPT, Origin
from exitax.models import ExitLM, Params

# Fields of `DecodeState` and of `ExitRecord` with an entry per text.
_OF_TEXTS = ('tokens', 'prompt_length', 'step', 'done', 'stop_reason', 'requests')
_RECORDS_OF_TEXTS = (
  'exit_layer',
  'confidence',
  'agreement',
  'log_prob',
  'top_ids',
  'top_log_probs',
)


@struct.dataclass
class Singles:
  """Which rows were taken out.

  Attributes:
    text: i32 `[rows]`, each row's text; one of them in rows that stay.
    taken: bool `[rows]`.
  """

  text: jax.Array
  taken: jax.Array


@decode_jit(static=('model', 'plan', 'visibility'), donated=('state',))
def run_singles(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  num_steps: jax.Array | int,
  *,
  plan: StepPlan,
  visibility: Causal,
  texts: jax.Array,
) -> DecodeState:
  """`run_steps` for texts that are alone in their rows; `state` is donated.

  Args:
    model: the model.
    params: parameters after `prepare_params`.
    state: of groups, after prefill; `Positions.SLOTS` and slot 0, or `Positions.SHARED`.
    num_steps: traced.
    plan: whatever suits the layout of the state.
    visibility: of rows without groups.
    texts: bool `[texts]`, those to advance. Each must be alone in its row, and have begun with it.
  """
  rows, singles = take_singles(state, texts)
  rows = run_steps(model, params, rows, num_steps, plan=plan, visibility=visibility)
  return put_back_singles(state, rows, singles)


def take_singles(state: DecodeState, texts: jax.Array) -> tuple[DecodeState, Singles]:
  """The rows of the marked texts (bool `[texts]`) as a state without groups; other rows of it are done."""
  group = _group(state)
  num_rows = state.fill.shape[0]
  row = jnp.where(texts, group.row, num_rows)
  singles = Singles(
    text=jnp.zeros((num_rows,), jnp.int32).at[row].set(jnp.arange(row.shape[0]), mode='drop'),
    taken=jnp.zeros((num_rows,), bool).at[row].set(True, mode='drop'),
  )

  def of(record: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: jax.tree.map(lambda x: x[singles.text], getattr(record, name)) for name in names}

  fields = of(state, _OF_TEXTS)
  cache = state.cache
  rows = dataclasses.replace(
    state,
    **{**fields, 'done': fields['done'] | ~singles.taken},
    cache=dataclasses.replace(cache, columns=dataclasses.replace(cache.columns, origin=None)),
    aux=dataclasses.replace(state.aux, **of(state.aux, _RECORDS_OF_TEXTS)),
    group=None,
  )
  return rows, singles


def put_back_singles(state: DecodeState, rows: DecodeState, singles: Singles) -> DecodeState:
  """`state` with the rows that were taken from it as they are now."""
  group = _group(state)
  place = jnp.where(singles.taken, singles.text, group.row.shape[0])

  def put(into: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.asarray(into).at[place].set(values, mode='drop')

  def fields(record: Any, changed: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {
      name: jax.tree.map(put, getattr(record, name), getattr(changed, name)) for name in names
    }

  def taken(new: jax.Array, old: jax.Array) -> jax.Array:
    """Of rows that stayed, what they were: there, the lengths of other texts may have cut something off."""
    return jnp.where(singles.taken[:, None], new, old)

  # The last token of a text that has ended is fed to nobody.
  fed = jnp.where(rows.done, rows.length, rows.length - 1)
  before = state.cache.columns
  columns = KeyColumns(
    position=taken(rows.cache.columns.position, before.position),
    valid=taken(rows.cache.columns.valid, before.valid),
    origin=jax.tree.map(taken, _origin(state, singles), before.origin),
  )
  return dataclasses.replace(
    rows,
    **fields(state, rows, _OF_TEXTS),
    cache=dataclasses.replace(rows.cache, columns=columns),
    fill=taken(rows.fill, state.fill),
    aux=dataclasses.replace(rows.aux, **fields(state.aux, rows.aux, _RECORDS_OF_TEXTS)),
    group=dataclasses.replace(group, fed=put(group.fed, fed)),
  )


def _origin(state: DecodeState, singles: Singles) -> Origin:
  """Of all columns: what steps of groups would have written into those of the rows."""
  group = _group(state)
  column = jnp.arange(state.cache.columns.valid.shape[1])
  shared = group.shared[singles.text][:, None]
  of_text = column >= shared

  def per_column(values: jax.Array) -> jax.Array:
    return jnp.broadcast_to(values[singles.text][:, None], of_text.shape)

  return Origin(
    owner=jnp.where(of_text, per_column(group.thinker), PROMPT),
    step=jnp.where(of_text, column - shared, -1),
    rank=per_column(group.rank),
    lag=per_column(group.lag),
    by_rank=per_column(group.by_rank),
    sees_all=per_column(group.sees_all),
  )


def _group(state: DecodeState) -> Grouping:
  assert state.group is not None, 'only a state of groups has single texts to take out'
  return state.group
