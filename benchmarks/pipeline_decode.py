"""Ticks per token of decoding over pipeline stages: what an early exit saves where layers lie on several devices.

  python benchmarks/pipeline_decode.py [--quick | --full]

The quickstart's model over 3 emulated stages, two layers and one exit's cut each, on held-out prompts one
at a time. A tick is the time of one stage; without exits a token takes as many as there are stages. Every
text is checked to be that of `deferred` on one device. Nothing is timed: emulated devices share the cores.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from common import Effort, effort_from_arguments, finish, say
from step_timer import StepTimer
from trained import held_out, trained

from exitax import decode
from exitax.checkpoint import LoadedModel
from exitax.models import Params
from exitax.parallel import MeshConfig, ShardingRules, emulate_devices, make_mesh, use

STAGES = 3
PROMPT = 32
THRESHOLDS = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.0)
# Prompts and tokens each.
SIZES = {Effort.QUICK: (2, 16), Effort.NORMAL: (8, 96), Effort.FULL: (64, 160)}


def main() -> None:
  """Counts the ticks at every threshold, and prints a table and one JSON object."""
  effort = effort_from_arguments(__doc__)
  emulate_devices(STAGES)
  loaded = trained('quickstart', effort)
  count, new_tokens = SIZES[effort]
  prompts = held_out(loaded, count=count, num_tokens=PROMPT)
  finish('pipeline_decode', [_row(loaded, prompts, x, new_tokens) for x in THRESHOLDS], [])


def _row(
  loaded: LoadedModel, prompts: list[list[int]], threshold: float, new_tokens: int
) -> dict[str, Any]:
  say(f'threshold {threshold}')
  mesh = make_mesh(MeshConfig(data=1, pipeline=STAGES), jax.devices()[:STAGES])
  ticks, layers = [], []
  for prompt in prompts:
    alone = decode.generate(
      loaded.model,
      loaded.params,
      [prompt],
      max_new_tokens=new_tokens,
      policy=decode.DeferredExit(threshold=threshold),
    )
    policy = decode.PipelineExit(threshold=threshold)
    with use(mesh, ShardingRules()):
      staged = StepTimer(
        loaded.model, _on_stages(loaded, policy), policy, [prompt], new_tokens=new_tokens
      )
    if staged.tokens != alone.tokens:
      raise SystemExit(f'threshold {threshold}: stages wrote another text than one device')
    ticks.append(int(staged.state.aux.extra[decode.TICKS].sum()))
    layers.append(staged.effective_layers)
  per_token = sum(ticks) / (new_tokens * len(prompts))
  return {
    'threshold': threshold,
    'layers_per_token': float(np.mean(layers)),
    'ticks_per_token': per_token,
    'speedup_in_ticks': STAGES / per_token,
  }


def _on_stages(loaded: LoadedModel, policy: decode.PipelineExit) -> Params:
  """Prepared parameters, from the host: they lie on the first device, and each stage takes its part."""
  placement = policy.plan(loaded.model.config).placement
  return placement.prepare_params(loaded.model, jax.device_get(loaded.params))


if __name__ == '__main__':
  main()
