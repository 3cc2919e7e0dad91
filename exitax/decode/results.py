"""What decoding hands back, as NumPy arrays on the host."""

from __future__ import annotations

import dataclasses

import numpy as np

from exitax.decode.state import DecodeState, StopReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One row's generated tokens and how each was chosen.

  Attributes:
    tokens: i32 `[length]`, without the prompt; ends with the stop token if one stopped it.
    exit_layers: i32 `[length]`, layers run when the token was chosen.
    confidences: f32 `[length]`, at the exit that chose it.
    agreements: i32 `[length]`, of `Agreement`: whether the final layer ranks the same token first.
    log_probs: f32 `[length]`, of each token under the scores it was chosen from, unfiltered.
    top_ids: i32 `[length, num_top]`, the best tokens of those scores.
    top_log_probs: f32 `[length, num_top]`, theirs.
    stop_reason: why it ended; RUNNING while streaming.
    passes: i32 `[num_segments]`, how often each segment of layers ran for the row, prefill aside.
  """

  tokens: np.ndarray
  exit_layers: np.ndarray
  confidences: np.ndarray
  agreements: np.ndarray
  log_probs: np.ndarray
  top_ids: np.ndarray
  top_log_probs: np.ndarray
  stop_reason: StopReason
  passes: np.ndarray

  @property
  def effective_layers(self) -> float:
    """Mean layers per token at the exits; NaN without a token."""
    return float(np.mean(self.exit_layers)) if len(self.exit_layers) else float('nan')


@dataclasses.dataclass(frozen=True)
class GenerateResult:
  """One completion per prompt, in the order of the prompts."""

  completions: tuple[Completion, ...]

  @property
  def tokens(self) -> list[list[int]]:
    """Generated token ids per prompt."""
    return [completion.tokens.tolist() for completion in self.completions]

  @property
  def lengths(self) -> np.ndarray:
    """Tokens generated, i32 `[prompts]`."""
    return np.asarray([len(completion.tokens) for completion in self.completions], np.int32)

  @property
  def effective_layers(self) -> float:
    """Mean layers per generated token over all prompts; NaN without a token."""
    layers = np.concatenate([completion.exit_layers for completion in self.completions])
    return float(np.mean(layers)) if len(layers) else float('nan')


@dataclasses.dataclass(frozen=True)
class StreamEvent:
  """What each row gained since the last event; rows that have ended gain nothing.

  Attributes:
    gains: one `Completion` per prompt, holding the new tokens only.
  """

  gains: tuple[Completion, ...]


def completions_since(state: DecodeState, start: np.ndarray) -> tuple[Completion, ...]:
  """Each row's tokens from number `start` (i32 `[rows]`) of the generated ones on."""
  aux = state.aux
  by_column = {
    'tokens': state.tokens,
    'exit_layers': aux.exit_layer,
    'confidences': aux.confidence,
    'agreements': aux.agreement,
    'log_probs': aux.log_prob,
    'top_ids': aux.top_ids,
    'top_log_probs': aux.top_log_probs,
  }
  arrays = {name: np.array(array) for name, array in by_column.items()}
  prompt, step = np.array(state.prompt_length), np.array(state.step)
  reasons, passes = np.array(state.stop_reason), np.array(aux.passes)
  if state.group is not None:
    passes = passes[np.array(state.group.row)]

  def completion(row: int) -> Completion:
    span = slice(prompt[row] + start[row], prompt[row] + step[row])
    return Completion(
      **{name: array[row, span] for name, array in arrays.items()},
      stop_reason=StopReason(int(reasons[row])),
      passes=passes[row],
    )

  return tuple(completion(row) for row in range(len(prompt)))
