"""What a `LanguageModel` is asked and answers, as frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from exitax.decode import StopReason
from exitax.objectives import ExitScore

# A text is `checkpoint.CERTIFIED`.
Threshold = float | Sequence[float] | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCompletion:
  """What the model wrote after a prompt.

  Attributes:
    prompt: the prompt.
    text: the continuation, without the stop token.
    pieces: the text of each token (an incomplete character shows with the token that completes it).
    tokens: token ids.
    exit_layers: layers run for each token.
    confidences: confidence at the exit that chose each token.
    log_probs: log-probability of each token under the scores it was chosen from, unfiltered.
    stop_reason: STOP_TOKEN, or BUDGET when `max_new_tokens` ended it.
  """

  prompt: str
  text: str
  pieces: tuple[str, ...]
  tokens: tuple[int, ...]
  exit_layers: tuple[int, ...]
  confidences: tuple[float, ...]
  log_probs: tuple[float, ...]
  stop_reason: StopReason

  @property
  def effective_layers(self) -> float:
    """Mean layers per token."""
    return sum(self.exit_layers) / max(len(self.exit_layers), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
  """How well every exit predicts a text.

  Attributes:
    text: the text.
    exits: scores of each exit, shallow to deep, the final layer last.
  """

  text: str
  exits: tuple[ExitScore, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitChoice:
  """How a request exits.

  Attributes:
    strategy: by name; None takes what suits the threshold and the model.
    threshold: a number, one per exit, or None.
    confidence: the measure's name.
  """

  strategy: str | None
  threshold: float | Sequence[float] | None
  confidence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEvent:
  """One token as it is chosen.

  Attributes:
    piece: the text that it completes; may be empty.
    token: its id.
    exit_layer: layers run for it.
    confidence: at the exit that chose it.
  """

  piece: str
  token: int
  exit_layer: int
  confidence: float
