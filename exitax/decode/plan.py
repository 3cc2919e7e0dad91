"""What the loop asks of a way of decoding: a static plan whose steps turn a state into gains."""

from __future__ import annotations

import enum
from typing import Any, Protocol

import jax
from flax import struct

from exitax.decode.confidence import Confidence
from exitax.decode.lanes import Visibility
from exitax.models import ExitLM, Params


class Record(enum.Enum):
  """What is recorded of each decision."""

  DECISION = 'decision'  # Exit layer and confidence; agreement where the final layer decided.
  AGREEMENT = 'agreement'  # Every token goes on to the final layer, to compare: no time is saved.


class Agreement(enum.IntEnum):
  """Whether the final layer would have ranked the same token first."""

  UNKNOWN = -1
  DIFFERENT = 0
  SAME = 1


@struct.dataclass
class Gain:
  """Tokens that a step adds to each row, and how each was chosen.

  Attributes:
    tokens: i32 `[rows, width]`, in the order of the text.
    count: i32 `[rows]`, how many of them are meant; 0 for rows that are done.
    scores: `[rows, width, vocab]` that each was chosen from, before temperature and filters.
    exit_layer: i32 `[rows, width]`, layers run when it was chosen.
    confidence: f32 `[rows, width]`, at the exit that chose it.
    agreement: i32 `[rows, width]`, of `Agreement`.
  """

  tokens: jax.Array
  count: jax.Array
  scores: jax.Array
  exit_layer: jax.Array
  confidence: jax.Array
  agreement: jax.Array


class StepPlan(Protocol):
  """The static, hashable part of a policy: what a step is compiled for.

  Rows of one state may be advanced by different plans if these have the same segments, heads and
  capacity.
  """

  @property
  def segments(self) -> tuple[range, ...]:
    """Spans of layers whose caches may be filled to different lengths."""
    ...

  @property
  def head_layers(self) -> tuple[int, ...]:
    """Layers of the exits that need cache entries of their own."""
    ...

  @property
  def pending_capacity(self) -> int:
    """Tokens of a row that may wait before a segment."""
    ...

  @property
  def overhang(self) -> int:
    """Columns that windows of lanes may reach beyond a row's last token."""
    ...

  @property
  def confidence(self) -> Confidence:
    """The measure that is compared or recorded."""
    ...

  @property
  def num_top(self) -> int:
    """Best alternatives whose log-probabilities are recorded per token."""
    ...

  def init_extra(self, rows: int) -> dict[str, Any]:
    """What the plan keeps in `ExitRecord.extra`: arrays by name, rows first."""
    ...

  def advance(
    self, model: ExitLM, params: Params, state: Any, *, visibility: Visibility
  ) -> tuple[Any, Gain]:
    """Extends the caches of rows that are not done, and chooses tokens; does not append them.

    Args:
      model: the model.
      params: parameters after `prepare_params`.
      state: the `DecodeState` before the step.
      visibility: which keys a token sees.

    Returns:
      The state with cache, fill, pending and `aux` moved on, and the tokens to append.
    """
    ...
