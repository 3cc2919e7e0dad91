"""What 8-bit matrices and 8-bit keys and values cost in quality, and what they save.

  python benchmarks/int8.py [--quick | --full]

The quickstart's model, trained on Python's standard library by its own command (minutes, once). Loss is
that of held-out text at every exit, read through the cache as decoding reads it, so that rounded keys
and values count; texts are greedy continuations at full depth, compared with those of the
unrounded model. With --quick a missing model is trained for seconds, and the numbers mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Effort, effort_from_arguments, finish, in_turns, median_ratio, say
from step_timer import StepTimer
from trained import held_out, trained

from exitax import decode
from exitax.checkpoint import LoadedModel
from exitax.decode import CacheFormat, WeightFormat
from exitax.decode.cache import empty_in_format
from exitax.decode.scores import head_logits
from exitax.models import ExitLM, Params

LENGTH = 128
PROMPT = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """How much is read and written."""

  windows: int
  prompts: int
  new_tokens: int
  repeats: int


SIZES = {
  Effort.QUICK: Size(windows=4, prompts=2, new_tokens=16, repeats=2),
  Effort.NORMAL: Size(windows=64, prompts=16, new_tokens=64, repeats=5),
  Effort.FULL: Size(windows=256, prompts=64, new_tokens=96, repeats=7),
}


class Subject:
  """The model in one pair of formats."""

  def __init__(
    self, loaded: LoadedModel, weights: WeightFormat, kv_cache: CacheFormat, size: Size
  ) -> None:
    self.model, self.weights, self.kv_cache = loaded.model, weights, kv_cache
    self.params = decode.prepare_params(self.model, loaded.params, weights=weights)
    windows = jnp.asarray(held_out(loaded, count=size.windows, num_tokens=LENGTH))
    say(f'weights {weights.value}, cache {kv_cache.value}')
    self.losses = [float(x) for x in _losses(self.model, self.params, windows, kv_cache)]
    prompts = held_out(loaded, count=size.prompts, num_tokens=PROMPT)
    result = decode.generate(
      self.model,
      self.params,
      prompts,
      max_new_tokens=size.new_tokens,
      cache_format=kv_cache,
    )
    self.texts = np.asarray([list(tokens) for tokens in result.tokens])
    self.timer = StepTimer(
      self.model,
      self.params,
      decode.FullDepth(),
      prompts[:1],
      new_tokens=size.new_tokens,
      cache_format=kv_cache,
    )

  def row(self, base: Subject, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A line of the table, beside the model that nothing was rounded of."""
    depths = self.model.config.depths
    # Up to the first token that differs the two have read the same.
    same = np.cumprod(self.texts == base.texts, axis=1)
    return {
      'weights': self.weights.value,
      'kv_cache': self.kv_cache.value,
      'weights_mb': sum(x.nbytes for x in jax.tree.leaves(self.params)) / 1e6,
      **{f'nll_{d}': loss for d, loss in zip(depths, self.losses, strict=True)},
      'loss_ratio': max(a / b for a, b in zip(self.losses, base.losses, strict=True)),
      'same_before_first_difference': float(same.mean()),
      'whole_texts_alike': float(same[:, -1].mean()),
      'ms_per_step': statistics.median(seconds[self.name]) / self.texts.shape[1] * 1e3,
      'speedup': median_ratio(seconds[base.name], seconds[self.name]),
    }

  @property
  def name(self) -> str:
    """For timings."""
    return f'{self.weights.value}, {self.kv_cache.value}'


def main() -> None:
  """Measures the four pairs of formats and prints a table and one JSON object."""
  effort = effort_from_arguments(__doc__)
  size = SIZES[effort]
  loaded = trained('quickstart', effort)
  subjects = [
    Subject(loaded, weights, kv_cache, size)
    for weights, kv_cache in itertools.product(WeightFormat, CacheFormat)
  ]
  seconds = in_turns({x.name: x.timer.seconds for x in subjects}, size.repeats)
  finish('int8', [x.row(subjects[0], seconds) for x in subjects], [])


@functools.partial(jax.jit, static_argnames=('model', 'kv_cache'))
def _losses(model: ExitLM, params: Params, tokens: jax.Array, kv_cache: CacheFormat) -> jax.Array:
  """Mean nats per token at every exit and at last at the end, f32 `[exits + 1]`."""
  rows, length = tokens.shape
  plan = decode.DeferredExit(threshold=1.0).plan(model.config)
  cache = empty_in_format(
    decode.init_cache(model.config, rows=rows, capacity=length, head_layers=plan.head_layers),
    kv_cache,
  )
  lanes = decode.consecutive_lanes(
    jnp.zeros(rows, jnp.int32), jnp.full(rows, length), num_lanes=length
  )
  hidden, losses = model.embed(params, tokens), []
  for segment, exit_config in zip(plan.segments, (*plan.exits, None), strict=True):
    after = decode.extend(
      model, params, cache, hidden, lanes, layers=segment, visibility=decode.Causal(None)
    )
    cache, hidden = after.cache, after.hidden
    features = after.head_features.get(segment.stop, hidden)
    scores = head_logits(model, params, exit_config, features.reshape(rows * length, -1)).reshape(
      rows, length, -1
    )
    log_probs = jax.nn.log_softmax(scores[:, :-1].astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2)
    losses.append(-jnp.mean(chosen))
  return jnp.stack(losses)


if __name__ == '__main__':
  main()
