"""Wall-clock of decoding at each threshold, beside decoding with all layers in the same minutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from exitax.data import Progress, quiet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
  """What decoding one prompt gave.

  Attributes:
    tokens: int `[new_tokens]`, the generated ones.
    exit_layers: int `[new_tokens]`, layers run when each was chosen.
    layer_passes: how often a layer ran, for one token or several at once.
    seconds: what that took.
  """

  tokens: np.ndarray
  exit_layers: np.ndarray
  layer_passes: int
  seconds: float


# Prompt index and threshold (None: every layer, no exits) to the result.
DecodeFn = Callable[[int, float | None], Decoded]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedRow:
  """Decoding at one threshold.

  Attributes:
    threshold: in [0, 1].
    tokens_per_second: generated tokens over the median time; prefill is left out.
    speed_up: median over repeats of full decoding's time over this one's.
    effective_layers: mean number of layers run when a token was chosen.
    layer_passes: layers run per token, those that fill caches later included. One pass may take
      several waiting tokens, so this can be below or above `effective_layers`.
    agreement: share of generated tokens equal to full decoding's at the same place. Once texts part
      they stay apart, so this falls faster than the agreement of single tokens.
    matching_prefix: mean number of tokens before the first difference from full decoding.
  """

  threshold: float
  tokens_per_second: float
  speed_up: float
  effective_layers: float
  layer_passes: float
  agreement: float
  matching_prefix: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedReport:
  """Times of all thresholds.

  Attributes:
    confidence: the measure that decided.
    prompts: how many were decoded, one at a time.
    prompt_tokens: length of each.
    new_tokens: generated after each.
    repeats: times that everything was measured.
    full_tokens_per_second: decoding without exits.
    rows: one per threshold, in the order given.
  """

  confidence: str
  prompts: int
  prompt_tokens: int
  new_tokens: int
  repeats: int
  full_tokens_per_second: float
  rows: tuple[SpeedRow, ...]


def measure_speed(
  decode_fn: DecodeFn,
  *,
  thresholds: Sequence[float],
  confidence: str,
  prompts: int,
  prompt_tokens: int,
  repeats: int,
  max_seconds: float,
  progress: Progress = quiet,
) -> SpeedReport:
  """Decodes every prompt at every threshold and without exits, `repeats` times in turn.

  All settings are gone through in every repeat, every other time backwards, so that a machine that
  slows down slows all of them. Texts are the same in each repeat (decoding is greedy) and are
  compared once.

  Args:
    decode_fn: decodes one prompt.
    thresholds: settings beside full decoding.
    confidence: name of the measure, for the report.
    prompts: how many prompts `decode_fn` knows.
    prompt_tokens: their length, for the report.
    repeats: at least 1.
    max_seconds: decoding time after which no further repeat is begun; the first is always whole.
    progress: wraps the settings of each repeat.
  """
  settings: list[float | None] = [None, *thresholds]
  # Compiles both programs; thresholds are data, so one of them stands for all.
  for setting in settings[:2]:
    decode_fn(0, setting)
  texts: dict[int, list[Decoded]] = {}
  laps: list[np.ndarray] = []
  while len(laps) < repeats and (not laps or _another_fits(laps, max_seconds)):
    seconds = np.zeros(len(settings))
    order = range(len(settings))
    shown = progress(
      reversed(order) if len(laps) % 2 else order,
      total=len(settings),
      label=f'timing decoding, {len(laps) + 1} of {repeats}',
    )
    for place in shown:
      texts[place] = [decode_fn(prompt, settings[place]) for prompt in range(prompts)]
      seconds[place] = sum(text.seconds for text in texts[place])
    laps.append(seconds)
  times = np.stack(laps)
  new_tokens = len(texts[0][0].tokens)
  seconds = np.median(times, axis=0)
  return SpeedReport(
    confidence=confidence,
    prompts=prompts,
    prompt_tokens=prompt_tokens,
    new_tokens=new_tokens,
    repeats=len(laps),
    full_tokens_per_second=float(prompts * new_tokens / seconds[0]),
    rows=tuple(
      SpeedRow(
        threshold=float(threshold),
        tokens_per_second=float(prompts * new_tokens / seconds[place]),
        speed_up=float(np.median(times[:, 0] / times[:, place])),
        **_compare(texts[place], texts[0]),
      )
      for place, threshold in enumerate(thresholds, start=1)
    ),
  )


def _another_fits(laps: Sequence[np.ndarray], max_seconds: float) -> bool:
  """Whether one more lap, as long as those before on average, ends in time."""
  spent = float(np.sum(laps))
  return spent + spent / len(laps) <= max_seconds


def _compare(texts: Sequence[Decoded], full: Sequence[Decoded]) -> dict[str, float]:
  """The fields of a SpeedRow that come from what was generated, not from how fast."""
  same = np.stack([a.tokens == b.tokens for a, b in zip(texts, full, strict=True)])
  return {
    'effective_layers': float(np.mean([text.exit_layers for text in texts])),
    'layer_passes': float(sum(text.layer_passes for text in texts) / same.size),
    'agreement': float(np.mean(same)),
    'matching_prefix': float(np.mean(np.sum(np.cumprod(same, axis=1), axis=1))),
  }
