"""The pipeline executor: runs any schedule's table with any stage function. Knows no layers.

Everything here runs inside `jax.shard_map` with the pipeline axis manual, one program on every
stage: loops over the ticks of each phase of the table, a forward and a backward of some chunk in
each, and one exchange with the neighbours after it. There are no branches on the stage (but where
bubbles are filled): idle work is done on stale values and counts nothing.

The backward of a chunk is the gradient of

  loss_fn(taps) + <gradient from the next stage, hidden>

with respect to the chunk's parameters and input, which is the auxiliary loss of EE-LLM (arXiv
2312.04916, section 3.1): the loss of an exit is computed on the stage where the exit is, in the
backward tick, and nothing but hidden states and their gradients ever crosses stages.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.parallel.residuals import rebuild_pullback, residuals_of
from exitax.parallel.schedule import Phase, Schedule, WorkTable

PyTree = Any


class Keep(enum.Enum):
  """What a stage keeps of a forward until its backward."""

  INPUTS = 'inputs'  # The chunk's input: the backward runs the chunk again.
  RESIDUALS = 'residuals'  # What the backward reads: nothing is computed twice.


class StageFn(Protocol):
  """Runs one span of layers.

  Args of the call:
    params: the span's own parameters, one chunk of the stage's.
    shared: parameters that every stage holds whole.
    hidden: what the span before sent; of no meaning to span 0, which makes its own.
    microbatch: one microbatch of the arrays that are not differentiated.
    span: i32 scalar, which span.

  Returns:
    What goes to the next span, and whatever the loss reads (hidden states at exits).
  """

  def __call__(
    self, params: PyTree, shared: PyTree, hidden: jax.Array, microbatch: PyTree, span: jax.Array
  ) -> tuple[jax.Array, PyTree]: ...


class LossFn(Protocol):
  """Losses of one span, as a sum to be added up over spans and microbatches.

  Args of the call:
    shared: as in `StageFn`.
    taps: the second result of `StageFn`.
    microbatch: as in `StageFn`.
    span: as in `StageFn`.
    counts: f32 scalar, 1, or 0 if this is idle work whose result must be zero.

  Returns:
    The loss, a scalar that is differentiated (each device's own part of it, if stages compute it
    together), and a tree of sums that add up over stages.
  """

  def __call__(
    self, shared: PyTree, taps: PyTree, microbatch: PyTree, span: jax.Array, counts: jax.Array
  ) -> tuple[jax.Array, PyTree]: ...


@dataclasses.dataclass(frozen=True)
class StageProgram:
  """What the stages compute.

  Attributes:
    stage_fn: runs a span.
    loss_fn: its losses.
    hidden_like: shape and dtype of what spans exchange, from a microbatch.
  """

  stage_fn: StageFn
  loss_fn: LossFn
  hidden_like: Callable[[PyTree], jax.ShapeDtypeStruct]


@struct.dataclass
class PipelineResult:
  """What one stage has after the last tick; nothing is added up over devices yet.

  Attributes:
    sums: the stage's part of the sums.
    params: gradient of its parameters, in at least float32; None after an evaluation.
    shared: its part of the gradient of the shared parameters, likewise.
  """

  sums: PyTree
  params: PyTree
  shared: PyTree


def run_pipeline(
  program: StageProgram,
  schedule: Schedule,
  params: PyTree,
  shared: PyTree,
  microbatches: PyTree,
  *,
  axis: str,
  keep: Keep = Keep.INPUTS,
) -> PipelineResult:
  """Losses and gradients of all microbatches, for one stage of `jax.shard_map`.

  Args:
    program: what the stages compute.
    schedule: when; its stages are the size of `axis`.
    params: the stage's parameters, every leaf `[num_chunks, ...]`.
    shared: parameters that every stage holds.
    microbatches: every leaf `[num_parts, ...]`.
    axis: name of the manual mesh axis of the stages.
    keep: what is kept between forward and backward; no matter for an evaluation.
  """
  return _Executor(program, schedule, params, shared, microbatches, axis, keep).run()


@struct.dataclass
class _Carry:
  """What goes from tick to tick.

  Attributes:
    hidden: received from the span before.
    gradient: received from the span after.
    late: received from the span before by forwards in the place of a backward, `[lanes, ...]`;
      empty unless bubbles are filled.
    ring: what is kept, every leaf `[num_slots + 1, ...]`; the last slot is that of idle work.
    sums: added up so far; so are `params` and `shared`, the gradients.
  """

  hidden: jax.Array
  gradient: jax.Array
  late: PyTree
  ring: PyTree
  sums: PyTree
  params: PyTree
  shared: PyTree


@struct.dataclass
class _Work:
  """A row of a work table, for this stage: i32 scalars (while scanning, `[ticks]`).

  `begins` is True where no gradient comes from the next stage although it is not the last.
  """

  microbatch: jax.Array
  chunk: jax.Array
  slot: jax.Array
  begins: jax.Array


class _Executor:
  """One run, with what every tick needs at hand; pure as the functions it is made of."""

  def __init__(
    self,
    program: StageProgram,
    schedule: Schedule,
    params: PyTree,
    shared: PyTree,
    microbatches: PyTree,
    axis: str,
    keep: Keep,
  ) -> None:
    self._program, self._schedule, self._axis, self._keep = program, schedule, axis, keep
    self._params, self._shared, self._microbatches = params, shared, microbatches
    self._stage = jax.lax.axis_index(axis)
    self._num_spans = schedule.num_stages * schedule.num_chunks
    self._trains = bool(schedule.backward.busy.any())

  def run(self) -> PipelineResult:
    carry = self._initial()
    for phase in self._schedule.phases:
      carry = self._run_phase(carry, phase)
    grads = (carry.params, carry.shared) if self._trains else (None, None)
    return PipelineResult(sums=carry.sums, params=grads[0], shared=grads[1])

  def _run_phase(self, carry: _Carry, phase: Phase) -> _Carry:
    forwards = self._column(self._schedule.forward, phase)
    backwards = self._column(self._schedule.backward, phase, self._schedule.begins)
    table = self._schedule.late if phase.has_late else None
    late = self._column(table, phase) if table is not None else None

    def tick(carry: _Carry, rows: tuple[_Work, _Work, _Work | None]) -> tuple[_Carry, None]:
      sent_hidden, sent_gradient, sent_late = carry.hidden, carry.gradient, carry.late
      if phase.has_forward:
        carry, sent_hidden = self._forward(carry, rows[0], carry.hidden)
      if rows[2] is not None:
        carry, sent_gradient, sent_late = self._late_or_backward(carry, rows[2], rows[1])
      elif phase.has_backward:
        carry, sent_gradient = self._backward(carry, rows[1])
      # Outside of everything conditional, and last: neighbours meet here and nowhere else.
      if phase.has_forward:
        carry = dataclasses.replace(carry, hidden=self._send(sent_hidden, 1))
      if phase.has_backward:
        carry = dataclasses.replace(carry, gradient=self._send(sent_gradient, -1))
      if phase.has_late:
        carry = dataclasses.replace(carry, late=tuple(self._send(x, 1) for x in sent_late))
      return carry, None

    return jax.lax.scan(tick, carry, (forwards, backwards, late))[0]

  def _late_or_backward(
    self, carry: _Carry, late: _Work, work: _Work
  ) -> tuple[_Carry, jax.Array, PyTree]:
    """A backward, or the forwards that take its place: the one that this stage has.

    The only branch on the stage. Neither side may hold a collective over stages, so it is of no use
    to losses that stages compute together.
    """

    def forwards(carry: _Carry) -> tuple[_Carry, jax.Array, PyTree]:
      sent = []
      for lane, received in enumerate(carry.late):
        carry, hidden = self._forward(carry, jax.tree.map(lambda x, n=lane: x[n], late), received)
        sent.append(hidden)
      return carry, carry.gradient, tuple(sent)

    def backward(carry: _Carry) -> tuple[_Carry, jax.Array, PyTree]:
      late = carry.late
      carry, gradient = self._backward(carry, work)
      return carry, gradient, late

    return jax.lax.cond((late.microbatch >= 0).any(), forwards, backward, carry)

  # One chunk.

  def _forward(self, carry: _Carry, work: _Work, received: jax.Array) -> tuple[_Carry, jax.Array]:
    params, microbatch, span = self._pick(work)
    if not self._trains:
      hidden, taps = self._stage_fn(microbatch, span)(params, self._shared, received)
      counts = self._counts(work)
      _, sums = self._program.loss_fn(self._shared, taps, microbatch, span, counts)
      return self._add(carry, sums), hidden
    if self._keep is Keep.INPUTS:
      hidden, _ = self._stage_fn(microbatch, span)(params, self._shared, received)
      kept = received
    else:
      (hidden, taps), residuals = residuals_of(
        self._stage_fn(microbatch, span), params, self._shared, received
      )
      kept = (taps, residuals)
    ring = jax.tree.map(
      lambda ring, x: jax.lax.dynamic_update_index_in_dim(ring, x, work.slot, 0), carry.ring, kept
    )
    return dataclasses.replace(carry, ring=ring), hidden

  def _backward(self, carry: _Carry, work: _Work) -> tuple[_Carry, jax.Array]:
    params, microbatch, span = self._pick(work)
    stage_fn = self._stage_fn(microbatch, span)
    kept = _at(carry.ring, work.slot)
    if self._keep is Keep.INPUTS:
      (_, taps), pull_back = jax.vjp(stage_fn, params, self._shared, kept)
    else:
      taps, residuals = kept
      pull_back = rebuild_pullback(stage_fn, residuals, params, self._shared, carry.hidden)
    counts = self._counts(work)

    def loss_fn(shared: PyTree, taps: PyTree) -> tuple[jax.Array, PyTree]:
      return self._program.loss_fn(shared, taps, microbatch, span, counts)

    (_, sums), (of_head, of_taps) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(
      self._shared, taps
    )
    # The last span sends its hidden state to nobody.
    goes_on = (work.microbatch >= 0) & (span < self._num_spans - 1) & ~work.begins
    gradient = jnp.where(goes_on, carry.gradient, jnp.zeros_like(carry.gradient))
    of_params, of_stage, of_hidden = pull_back((gradient, of_taps))
    carry = self._add(carry, sums)
    params_sum = jax.tree.map(
      lambda total, g: total.at[work.chunk].add(g.astype(total.dtype)), carry.params, of_params
    )
    shared_sum = jax.tree.map(
      lambda total, *parts: total + sum(part.astype(total.dtype) for part in parts),
      carry.shared,
      of_head,
      of_stage,
    )
    return dataclasses.replace(carry, params=params_sum, shared=shared_sum), of_hidden

  def _stage_fn(self, microbatch: PyTree, span: jax.Array) -> Callable[..., Any]:
    def stage_fn(params: PyTree, shared: PyTree, hidden: jax.Array) -> tuple[jax.Array, PyTree]:
      return self._program.stage_fn(params, shared, hidden, microbatch, span)

    return stage_fn

  # Helpers.

  def _pick(self, work: _Work) -> tuple[PyTree, PyTree, jax.Array]:
    """Parameters, microbatch and number of the span that is worked on (any, if idle)."""
    params = _at(self._params, work.chunk)
    microbatch = _at(self._microbatches, jnp.maximum(work.microbatch, 0))
    return params, microbatch, work.chunk * self._schedule.num_stages + self._stage

  def _counts(self, work: _Work) -> jax.Array:
    return (work.microbatch >= 0).astype(jnp.float32)

  def _add(self, carry: _Carry, sums: PyTree) -> _Carry:
    return dataclasses.replace(carry, sums=jax.tree.map(jnp.add, carry.sums, sums))

  def _send(self, x: jax.Array, step: int) -> jax.Array:
    """What the neighbour in the other direction sent; the ring is closed only for several chunks."""
    num_stages = self._schedule.num_stages
    pairs = [(i, (i + step) % num_stages) for i in range(num_stages)]
    if self._schedule.num_chunks == 1:
      pairs = [(a, b) for a, b in pairs if b - a == step]
    return jax.lax.ppermute(x, self._axis, pairs) if pairs else x

  def _column(self, table: WorkTable, phase: Phase, begins: np.ndarray | None = None) -> _Work:
    def column(array: np.ndarray) -> jax.Array:
      rows = jnp.asarray(array[phase.start : phase.stop])
      return jax.lax.dynamic_index_in_dim(rows, self._stage, 1, keepdims=False)

    if begins is None:
      begins = np.zeros_like(table.microbatch, bool)
    return _Work(column(table.microbatch), column(table.chunk), column(table.slot), column(begins))

  def _initial(self) -> _Carry:
    microbatch = jax.tree.map(lambda x: x[0], self._microbatches)
    params = jax.tree.map(lambda x: x[0], self._params)
    like = self._program.hidden_like(microbatch)
    hidden, span = jnp.zeros(like.shape, like.dtype), jnp.zeros((), jnp.int32)

    def shapes(params: PyTree, shared: PyTree, microbatch: PyTree, hidden: jax.Array) -> Any:
      stage_fn = self._stage_fn(microbatch, span)
      (_, taps), residuals = residuals_of(stage_fn, params, shared, hidden)
      _, sums = self._program.loss_fn(shared, taps, microbatch, span, jnp.ones(()))
      return (taps, residuals), sums

    kept, sums = jax.eval_shape(shapes, params, self._shared, microbatch, hidden)
    if not self._trains:
      kept = ()
    elif self._keep is Keep.INPUTS:
      kept = like
    num_slots = self._schedule.num_slots + 1
    late = self._schedule.late
    lanes = 0 if late is None else late.microbatch.shape[2]

    def slots(x: jax.ShapeDtypeStruct) -> jax.Array:
      return jnp.zeros((num_slots, *x.shape), x.dtype)

    return _Carry(
      hidden=hidden,
      gradient=hidden,
      late=(hidden,) * lanes,
      ring=jax.tree.map(slots, kept),
      sums=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
      params=jax.tree.map(_wide_zeros, self._params) if self._trains else (),
      shared=jax.tree.map(_wide_zeros, self._shared) if self._trains else (),
    )


def _at(tree: PyTree, index: jax.Array) -> PyTree:
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def _wide_zeros(x: jax.Array) -> jax.Array:
  return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
