"""Wall-clock of several policies on the same prompts, in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from exitax.data import Progress, quiet
from exitax.decode import ExitPolicy
from exitax.evaluate.decoding import PromptDecoder
from exitax.evaluate.speed import Decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySpeed:
  """How fast a policy decodes.

  Attributes:
    tokens_per_second: generated tokens over the median time, prefill left out.
    speed_up: median over repeats of the first policy's time over this one's.
    same_text: share of tokens equal to the first policy's at the same place.
    texts: what it wrote, one per prompt.
  """

  tokens_per_second: float
  speed_up: float
  same_text: float
  texts: tuple[Decoded, ...]


def time_policies(
  decoder: PromptDecoder,
  policies: Mapping[str, ExitPolicy],
  *,
  repeats: int,
  max_seconds: float,
  progress: Progress = quiet,
) -> dict[str, PolicySpeed]:
  """Decodes every prompt with every policy, `repeats` times, prompt by prompt in turn.

  Args:
    decoder: the prompts.
    policies: by name; the first is what others are compared with.
    repeats: at least 1.
    max_seconds: decoding time after which no further repeat is begun; the first is always whole.
    progress: wraps the repeats' prompts.
  """
  prompts = range(decoder.num_prompts)
  for name in progress(list(policies), total=len(policies), label='compiling'):
    decoder.decode(0, policies[name])
  texts: dict[str, list[Decoded]] = {}
  laps: list[dict[str, float]] = []
  spent = 0.0
  while len(laps) < repeats and (not laps or spent + spent / len(laps) <= max_seconds):
    lap = dict.fromkeys(policies, 0.0)
    texts = {name: [] for name in policies}
    label = f'timing decoding, {len(laps) + 1} of {repeats}'
    for prompt in progress(prompts, total=len(prompts), label=label):
      for name, policy in policies.items():
        decoded = decoder.decode(prompt, policy)
        texts[name].append(decoded)
        lap[name] += decoded.seconds
    laps.append(lap)
    spent += sum(lap.values())
  first = next(iter(policies))
  return {
    name: PolicySpeed(
      tokens_per_second=_tokens(texts[name]) / float(np.median([lap[name] for lap in laps])),
      speed_up=float(np.median([lap[first] / lap[name] for lap in laps])),
      same_text=_same(texts[name], texts[first]),
      texts=tuple(texts[name]),
    )
    for name in policies
  }


def _tokens(texts: Sequence[Decoded]) -> int:
  return sum(len(text.tokens) for text in texts)


def _same(texts: Sequence[Decoded], full: Sequence[Decoded]) -> float:
  same = [a.tokens == b.tokens for a, b in zip(texts, full, strict=True)]
  return float(np.mean(np.concatenate(same)))
