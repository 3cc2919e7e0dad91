"""The training objective of one pipeline span: the losses of the exits that it holds."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.layers import Rotary
from exitax.models import Dropout, ExitLM, Params, StagePlan, packed_attend, run_span
from exitax.objectives.cross_entropy import ExitSums, exit_cross_entropy
from exitax.objectives.exit_objective import (
  ObjectiveConfig,
  PackedBatch,
  exits_by_matrix,
  losses_of_exits,
)
from exitax.parallel import gather_stages


class VocabPlacement(enum.Enum):
  """Who computes the scores of an exit."""

  STAGE = 'stage'  # The stage that holds the exit.
  PIPELINE = 'pipeline'  # All stages, a part of the vocabulary each.


@struct.dataclass
class Microbatch:
  """What a span reads beside parameters.

  Attributes:
    batch: packed tokens, `[rows, length]`.
    exit_weights: f32 `[exits + 1]`.
    dropout: what the training step drops from these rows; None outside of training.
  """

  batch: Any
  exit_weights: jax.Array
  dropout: Dropout | None = None


@struct.dataclass
class SharedParams:
  """Parameters that are no blocks.

  Attributes:
    whole: the tree of parameters without blocks; without the exits' matrices if `parts` has them.
    parts: for PIPELINE, the exits' vocabulary matrices, cut along the vocabulary; else empty.
  """

  whole: Params
  parts: Params


def split_shared(model: ExitLM, params: Params, placement: VocabPlacement) -> SharedParams:
  """All parameters but the blocks; linear in them. Matrices that two readers share are in both."""
  rest = {name: part for name, part in params.items() if name != 'blocks'}
  if placement is VocabPlacement.STAGE:
    return SharedParams(whole=rest, parts={})
  parts: Params = {}
  for path in {model.vocab_matrix_path(head) for head in (*model.config.exits, None)}:
    source, node = rest, parts
    for name in path[:-1]:
      source, node = source[name], node.setdefault(name, {})
    node[path[-1]] = source[path[-1]]
  exits = rest.get('exits', {})
  heads = {layer: {'head': item['head']} for layer, item in exits.items() if 'head' in item}
  whole = {'embed': rest['embed'], 'norm': rest['norm']} | ({'exits': heads} if heads else {})
  return SharedParams(whole=whole, parts=parts)


@dataclasses.dataclass(frozen=True)
class SpanObjective:
  """The stage program of a model's training: see `exitax.parallel.StageProgram`.

  Attributes:
    model: the model.
    plan: how it is cut into spans.
    config: z-loss and slice length; its weights are not read here.
    placement: who computes the scores of an exit.
    axis: manual mesh axis of the stages.
  """

  model: ExitLM
  plan: StagePlan
  config: ObjectiveConfig
  placement: VocabPlacement
  axis: str

  def hidden_like(self, microbatch: Microbatch) -> jax.ShapeDtypeStruct:
    """What spans exchange: the residual stream."""
    shape = (*microbatch.batch.tokens.shape, self.model.config.embed_dim)
    return jax.ShapeDtypeStruct(shape, self.model.config.precision.dtype)

  def run(
    self,
    params: Params,
    shared: SharedParams,
    hidden: jax.Array,
    microbatch: Microbatch,
    span: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """The stream after the span, and at its exits."""
    dropout = microbatch.dropout
    embedded = self.model.embed(shared.whole, microbatch.batch.tokens)
    if dropout is not None:
      embedded = dropout.drop_embedding(embedded)
    hidden = jnp.where(span == 0, embedded, hidden)
    rotary, attend = self._attention(microbatch.batch)
    return run_span(
      self.model,
      self.plan,
      params,
      hidden,
      span=span,
      rotary=rotary,
      attend=attend,
      dropout=dropout,
    )

  def loss(
    self,
    shared: SharedParams,
    taps: jax.Array,
    microbatch: Microbatch,
    span: jax.Array,
    counts: jax.Array,
  ) -> tuple[jax.Array, ExitSums]:
    """Weighted losses of the span's exits, and their sums."""
    batch = microbatch.batch
    batch = dataclasses.replace(batch, weights=batch.weights * counts)
    # Heads drop nothing.
    microbatch = dataclasses.replace(microbatch, batch=batch, dropout=None)
    if self.placement is VocabPlacement.STAGE:
      branches = [self._own_losses(exits) for exits in self.plan.exits]
      return jax.lax.switch(span, branches, shared, taps, microbatch)
    return self._common_losses(shared, taps, microbatch, span)

  def _own_losses(self, exits: tuple[int, ...]) -> Any:
    def losses(shared: SharedParams, taps: jax.Array, microbatch: Microbatch) -> Any:
      return losses_of_exits(
        self.model,
        shared.whole,
        self._features(exits, shared, taps, microbatch.batch),
        microbatch.batch,
        microbatch.exit_weights,
        config=self.config,
      )

    return losses

  def _common_losses(
    self, shared: SharedParams, taps: jax.Array, microbatch: Microbatch, span: jax.Array
  ) -> tuple[jax.Array, ExitSums]:
    """Every stage's exits, each stage scoring its part of the vocabulary."""

    def padded_features(exits: tuple[int, ...]) -> Any:
      def features(shared: SharedParams, taps: jax.Array, batch: PackedBatch) -> jax.Array:
        found = list(self._features(exits, shared, taps, batch).values())
        padding = [jnp.zeros_like(taps[0])] * (self.plan.max_exits - len(found))
        return jnp.stack([*found, *padding])

      return features

    branches = [padded_features(exits) for exits in self.plan.exits]
    features = jax.lax.switch(span, branches, shared, taps, microbatch.batch)
    batch = microbatch.batch
    # The stages are at different microbatches: targets and weights come along.
    features: Any = gather_stages(features, self.axis)
    targets, weights, spans = jax.lax.all_gather((batch.targets, batch.weights, span), self.axis)
    exit_of = jnp.asarray(self._exit_of)[spans]
    num_exits = len(self.plan.depths)
    loss, sums = jnp.zeros(()), None
    for exits in exits_by_matrix(self.model, range(num_exits)):
      slots = [
        (stage, slot)
        for stage in range(self.plan.num_stages)
        for slot in range(self.plan.max_exits)
        if any(self._exit_of[s, slot] in exits for s in self._spans_of(stage))
      ]
      at = tuple(np.asarray(slots).T)
      stages = at[0]
      here = exit_of[at]
      reads = jnp.isin(here, jnp.asarray(exits))
      result: Any = exit_cross_entropy(
        features[at],
        self.model.vocab_matrix(shared.parts, (*self.model.config.exits, None)[exits[0]]),
        targets[stages],
        weights[stages] * reads[:, None, None],
        microbatch.exit_weights[jnp.minimum(here, num_exits - 1)],
        self.config.z_loss,
        self.config.chunk_length,
        self.model.config.precision,
        self.axis,
      )
      loss = loss + result[0]
      mine = jax.tree.map(
        lambda x, here=here, reads=reads: (
          jnp.zeros((num_exits + 1,), x.dtype).at[here].add(x * reads)[:num_exits]
        ),
        result[1],
      )
      sums = mine if sums is None else jax.tree.map(jnp.add, sums, mine)
    # Every stage has the sums of all: one tells them.
    tells = jax.lax.axis_index(self.axis) == 0
    return loss, jax.tree.map(lambda x: jnp.where(tells, x, jnp.zeros_like(x)), sums)

  def _features(
    self, exits: tuple[int, ...], shared: SharedParams, taps: jax.Array, batch: PackedBatch
  ) -> dict[int, jax.Array]:
    heads = (*self.model.config.exits, None)
    rotary, attend = self._attention(batch)
    return {
      i: self.model.exit_features(shared.whole, heads[i], taps[slot], rotary=rotary, attend=attend)[
        0
      ]
      for slot, i in enumerate(exits)
    }

  def _attention(self, batch: PackedBatch) -> tuple[Rotary, Any]:
    rotary = self.model.rotary(batch.positions, below=batch.positions.shape[-1])
    window = self.model.config.sliding_window
    return rotary, packed_attend(batch.segment_ids, batch.positions, window)

  def _spans_of(self, stage: int) -> range:
    return range(stage, self.plan.num_spans, self.plan.num_stages)

  @property
  def _exit_of(self) -> np.ndarray:
    """I32 `[spans, max_exits]`: the exit in each slot, or the number of exits for none."""
    table = np.full((self.plan.num_spans, self.plan.max_exits), len(self.plan.depths), np.int32)
    for span, exits in enumerate(self.plan.exits):
      table[span, : len(exits)] = exits
    return table
