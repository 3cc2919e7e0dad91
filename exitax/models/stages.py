"""A model cut into spans of layers for a pipeline: which layers and exits each span has, and its run.

An exit after layer l belongs to the span that begins at or before l and goes on past it: an exit at
a boundary is the first thing of the next span (EE-LLM, arXiv 2312.04916, section 3.1, pre-exit), so
that it never waits on the stage before. The final head is the last thing of the last span.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exitax.errors import UserError
from exitax.layers import AttendFn, Rotary
from exitax.models.config import ModelConfig
from exitax.models.dropout import Dropout
from exitax.models.exit_lm import ExitLM, Params


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """Layers and exits of every span; span `chunk * num_stages + stage` runs on `stage`.

  Attributes:
    num_stages: stages.
    num_chunks: spans per stage.
    cuts: first layer of every span and, last, the number of layers.
    depths: layers run before each exit, the final head's last.
  """

  num_stages: int
  num_chunks: int
  cuts: tuple[int, ...]
  depths: tuple[int, ...]

  @property
  def num_spans(self) -> int:
    """Spans of all stages."""
    return self.num_stages * self.num_chunks

  @property
  def num_layers(self) -> tuple[int, ...]:
    """Layers of each span."""
    return tuple(stop - start for start, stop in itertools.pairwise(self.cuts))

  @property
  def max_layers(self) -> int:
    """Layers of the longest span; shorter ones are padded."""
    return max(self.num_layers)

  @property
  def is_even(self) -> bool:
    """All spans are equally long."""
    return len(set(self.num_layers)) == 1

  @property
  def exits(self) -> tuple[tuple[int, ...], ...]:
    """Of each span, indices of its exits in `depths`."""
    last = self.num_spans - 1
    return tuple(
      tuple(
        i
        for i, depth in enumerate(self.depths)
        if start <= depth < stop or (span == last and depth == stop)
      )
      for span, (start, stop) in enumerate(itertools.pairwise(self.cuts))
    )

  @property
  def first_exit(self) -> int | None:
    """The first span that holds an exit before the final head; None if there is none."""
    early = len(self.depths) - 1
    spans = [span for span, exits in enumerate(self.exits) if any(i < early for i in exits)]
    return spans[0] if spans else None

  @property
  def stages_to_first_exit(self) -> int:
    """Stages that a microbatch must pass to reach an exit before the final head; all if there is none."""
    return self.num_stages if self.first_exit is None else self.first_exit + 1

  @property
  def max_exits(self) -> int:
    """Exits of the span that has most."""
    return max(len(exits) for exits in self.exits)

  @property
  def layer_table(self) -> np.ndarray:
    """I32 `[stages, chunks, max_layers]`: layer at each place; padding repeats a span's last."""
    return self._by_stage([self._place(span) for span in range(self.num_spans)])

  @property
  def is_layer(self) -> np.ndarray:
    """Bool `[spans, max_layers]`: False where a place is padding."""
    return np.arange(self.max_layers) < np.asarray(self.num_layers)[:, None]

  @property
  def tap_rows(self) -> np.ndarray:
    """I32 `[spans, max_layers + 1]`: where the stream before each place (and at the end) is kept.

    Row i is the span's i-th exit, row `max_exits` is read by nobody.
    """
    rows = np.full((self.num_spans, self.max_layers + 1), self.max_exits, np.int32)
    for span, exits in enumerate(self.exits):
      for row, exit_index in enumerate(exits):
        rows[span, self.depths[exit_index] - self.cuts[span]] = row
    return rows

  def _place(self, span: int) -> list[int]:
    start, stop = self.cuts[span], self.cuts[span + 1]
    return [min(start + place, stop - 1) for place in range(self.max_layers)]

  def _by_stage(self, spans: Sequence[Sequence[int]]) -> np.ndarray:
    table = np.asarray(spans, np.int32).reshape(self.num_chunks, self.num_stages, -1)
    return table.swapaxes(0, 1)


def plan_stages(
  config: ModelConfig,
  *,
  num_stages: int,
  num_chunks: int = 1,
  layers_per_span: Sequence[int] | None = None,
  depth: int | None = None,
) -> StagePlan:
  """Cuts a model into spans: as even as it gets, later spans shorter, or as told.

  Args:
    config: the model.
    num_stages: stages of the pipeline.
    num_chunks: spans per stage.
    layers_per_span: layers of each span, in the order of the layers.
    depth: layers to run; the exits up to there, and no final head. None runs all.

  Raises:
    UserError: more spans than layers, or a division that does not fit.
  """
  num_spans = num_stages * num_chunks
  num_layers = config.num_layers if depth is None else depth
  if num_spans > num_layers:
    chunks = f' x num_chunks={num_chunks}' if num_chunks > 1 else ''
    run = 'num_layers' if depth is None else 'the last exit, at layer'
    raise UserError(
      f'pipeline={num_stages}{chunks} is more than {run}={num_layers}: '
      f'choose at most {num_layers} stages in all'
    )
  if layers_per_span is None:
    share, rest = divmod(num_layers, num_spans)
    layers_per_span = [share + (span < rest) for span in range(num_spans)]
  if len(layers_per_span) != num_spans or sum(layers_per_span) != num_layers:
    raise UserError(
      f'layers_per_span={tuple(layers_per_span)} must be {num_spans} numbers that add up to '
      f'num_layers={num_layers}'
    )
  if min(layers_per_span) < 1:
    raise UserError(f'layers_per_span={tuple(layers_per_span)} has a span without layers')
  cuts = tuple(itertools.accumulate(layers_per_span, initial=0))
  depths = tuple(item for item in config.depths if item <= num_layers)
  return StagePlan(num_stages, num_chunks, cuts, depths)


def stack_spans(plan: StagePlan, blocks: Params) -> Params:
  """Blocks `[num_layers, ...]` as `[stages, chunks, max_layers, ...]`; linear in the blocks."""
  if plan.cuts[-1] < jax.tree.leaves(blocks)[0].shape[0]:
    blocks = jax.tree.map(lambda x: x[: plan.cuts[-1]], blocks)
  if plan.is_even:
    shape = (plan.num_chunks, plan.num_stages, plan.max_layers)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]).swapaxes(0, 1), blocks)
  # Padding is never used: it must not count as a layer twice in the transposed map.
  table = jnp.asarray(plan.layer_table)
  keep = plan.is_layer.reshape(plan.num_chunks, plan.num_stages, -1).swapaxes(0, 1)

  def stack(x: jax.Array) -> jax.Array:
    mask = keep.reshape(*keep.shape, *(1,) * (x.ndim - 1))
    return jnp.take(x, table, axis=0) * jnp.asarray(mask, x.dtype)

  return jax.tree.map(stack, blocks)


def run_span(
  model: ExitLM,
  plan: StagePlan,
  blocks: Params,
  hidden: jax.Array,
  *,
  span: jax.Array,
  rotary: Rotary,
  attend: AttendFn,
  dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs one span and keeps the stream where its exits are. Differentiable; nothing is cached.

  Args:
    model: the model.
    plan: how it is cut.
    blocks: the span's blocks, `[max_layers, ...]`.
    hidden: `[batch, length, embed]`, the stream before the span.
    span: i32 scalar.
    rotary: angles of the tokens' positions.
    attend: mixes values within the batch; stateless.
    dropout: what a training step drops.

  Returns:
    The stream after the span, and `[max_exits, batch, length, embed]`.
  """
  run_block = model.stateless_block(rotary, attend, dropout)
  rows = jnp.asarray(plan.tap_rows)[span]
  is_layer = jnp.asarray(plan.is_layer)[span]
  layers = None
  if dropout is not None:
    layers = jnp.asarray(plan.cuts)[span] + jnp.arange(plan.max_layers)
  kept = jnp.zeros((plan.max_exits + 1, *hidden.shape), hidden.dtype)

  def step(carry: tuple[jax.Array, jax.Array], place: Any) -> Any:
    hidden, kept = carry
    block, row, runs, layer = place
    kept = jax.lax.dynamic_update_index_in_dim(kept, hidden, row, 0)
    after = run_block(block, hidden, layer)
    return (after if plan.is_even else jnp.where(runs, after, hidden), kept), None

  (hidden, kept), _ = jax.lax.scan(step, (hidden, kept), (blocks, rows[:-1], is_layer, layers))
  kept = jax.lax.dynamic_update_index_in_dim(kept, hidden, rows[-1], 0)
  return hidden, kept[: plan.max_exits]
