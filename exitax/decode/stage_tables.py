"""Which layers and exits each stage of a pipeline has, as tables for one program on all stages.

Layers are cut into stages over the `pipeline` mesh axis, one span each. A stage's layers are *places*
0, 1, ...; shorter stages are padded. An exit belongs to the stage that runs the layer before it: one
at a cut is judged a tick earlier than at the start of the next stage.

Worked miniature, 5 layers on 2 stages with exits after layers 1 and 3, the latter a LAYER head:

  stage  layers   places  exits (after place)  LAYER heads
  0      0 1 2    0 1 2   1 (0), 3 (2)         3
  1      3 4      0 1     final (1)            -
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools

import numpy as np

from exitax.layers import HeadKind
from exitax.models import ExitConfig, StagePlan

NO_PLACE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTables:
  """A model cut into stages.

  Attributes:
    stages: how the layers are cut; one span per stage.
    exits: the exits in use, by ascending layer.
  """

  stages: StagePlan
  exits: tuple[ExitConfig, ...]

  @property
  def num_stages(self) -> int:
    """Stages."""
    return self.stages.num_stages

  @property
  def segments(self) -> tuple[range, ...]:
    """Layers of each stage."""
    return tuple(range(a, b) for a, b in itertools.pairwise(self.stages.cuts))

  @property
  def depths(self) -> tuple[int, ...]:
    """Layers before each exit in use and, last, before the final head."""
    return (*(item.layer for item in self.exits), self.stages.cuts[-1])

  def stage_of(self, depth: int) -> int:
    """The stage that judges after `depth` layers."""
    return bisect.bisect_left(self.stages.cuts, depth) - 1

  @property
  def exits_of(self) -> tuple[tuple[int, ...], ...]:
    """Of each stage, indices of its exits in `depths`."""
    owner = [self.stage_of(depth) for depth in self.depths]
    return tuple(
      tuple(i for i, at in enumerate(owner) if at == stage) for stage in range(self.num_stages)
    )

  @property
  def heads_of(self) -> tuple[tuple[int, ...], ...]:
    """Of each stage, those of its exits that have a LAYER head."""
    return tuple(
      tuple(i for i in own if i < len(self.exits) and self.exits[i].head is HeadKind.LAYER)
      for own in self.exits_of
    )

  @property
  def num_head_slots(self) -> int:
    """LAYER heads of the stage that has most; the others carry padding."""
    return max(map(len, self.heads_of))

  @property
  def exit_places(self) -> np.ndarray:
    """I32 `[stages, most exits]`: the place before each exit; `NO_PLACE` where there is none."""
    return self._places(self.exits_of)

  @property
  def head_places(self) -> np.ndarray:
    """I32 `[stages, num_head_slots]`: the place before each LAYER head, likewise."""
    return self._places(self.heads_of)

  @property
  def head_exits(self) -> tuple[tuple[ExitConfig, ...], ...]:
    """For each slot of LAYER heads, the exit of each stage; padding repeats some other."""
    spare = next((item for item in self.exits if item.head is HeadKind.LAYER), None)
    return tuple(
      tuple(self.exits[own[slot]] if slot < len(own) else spare for own in self.heads_of)
      for slot in range(self.num_head_slots)
      if spare is not None
    )

  def _places(self, exits_of: tuple[tuple[int, ...], ...]) -> np.ndarray:
    table = np.full((self.num_stages, max(map(len, exits_of))), NO_PLACE, np.int32)
    for stage, own in enumerate(exits_of):
      table[stage, : len(own)] = [self.depths[i] - self.stages.cuts[stage] - 1 for i in own]
    return table
