"""What the loop asks of a way of decoding: a static plan whose steps turn a state into gains."""

from __future__ import annotations

import enum
from typing import Any, Protocol

import jax
from flax import struct

from exitax.decode.cache import KVCache
from exitax.decode.confidence import Confidence
from exitax.decode.lanes import Visibility
from exitax.decode.prepare import WeightFormat
from exitax.models import ExitLM, ModelConfig, Params


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
class TokenScores:
  """What is recorded of the scores that tokens were chosen from.

  Attributes:
    log_prob: f32 `[rows, width]`, of each token, at temperature 1 and before any filter.
    top_ids: i32 `[rows, width, num_top]`, the best tokens.
    top_log_probs: f32 `[rows, width, num_top]`, theirs.
  """

  log_prob: jax.Array
  top_ids: jax.Array
  top_log_probs: jax.Array


@struct.dataclass
class Gain:
  """Tokens that a step adds to each row, and how each was chosen.

  Attributes:
    tokens: i32 `[rows, width]`, in the order of the text.
    count: i32 `[rows]`, how many of them are meant; 0 for rows that are done.
    scores: `[rows, width, vocab]` that each was chosen from, before temperature and filters; or what
      is recorded of them, where scores stay on the device that made them.
    exit_layer: i32 `[rows, width]`, layers run when it was chosen.
    confidence: f32 `[rows, width]`, at the exit that chose it.
    agreement: i32 `[rows, width]`, of `Agreement`.
  """

  tokens: jax.Array
  count: jax.Array
  scores: jax.Array | TokenScores
  exit_layer: jax.Array
  confidence: jax.Array
  agreement: jax.Array


class Placement(Protocol):
  """Where a plan's layers and caches lie: static, hashable, equal where prepared parameters fit."""

  @property
  def steps_per_token(self) -> int:
    """Steps that a token takes at most."""
    ...

  def prepare_params(
    self, model: ExitLM, params: Params, *, weights: WeightFormat = WeightFormat.COMPUTE
  ) -> Params:
    """Parameters as the plan's steps read them; does nothing the second time."""
    ...

  def init_cache(
    self, config: ModelConfig, *, rows: int, capacity: int, head_layers: tuple[int, ...]
  ) -> KVCache:
    """An empty cache."""
    ...

  def init_pending(self, config: ModelConfig, plan: StepPlan, *, rows: int) -> tuple[Any, ...]:
    """`DecodeState.pending` before prefill: arrays, rows first."""
    ...

  def prefill(
    self,
    model: ExitLM,
    params: Params,
    state: Any,
    *,
    num_chunks: int,
    chunk: int,
    visibility: Visibility,
  ) -> Any:
    """The `DecodeState` with `num_chunks` chunks of each prompt cached in all layers.

    `state` is donated. The last prompt token is left for the first step.
    """
    ...


class StepPlan(Protocol):
  """The static, hashable part of a policy: what a step is compiled for.

  Rows of one state may be advanced by different plans if these have the same segments, heads and
  capacity.
  """

  @property
  def placement(self) -> Placement:
    """Where layers and caches lie; `LocalPlan` has the one that most plans share."""
    ...

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
