"""One GPU: bf16 MFU of a 1.3B early-exit model's training step, beside torch + transformers.

  python benchmarks/train_gpu.py [--quick]

EE-LLM's 1.3B model (gin/models/ee_1p3b.gin: 24 layers of width 2048, exits after a quarter and a half of
them), four rows of 2048 random tokens, bfloat16 products, float32 weights and AdamW. Both sides start
from the same weights, and their losses before the first step must agree; torch is compiled, under
autocast, with scaled_dot_product_attention. Both stay in the GPU's memory while they are measured in
turns, so layers are taken away, four at a time, until both fit.

MFU counts the model's flops, forward and backward, nothing computed twice and of attention only the
blocks that causality leaves (9/16 of the square: `layers/causal.py`), over the data sheet's dense peak.
Our attention is exitax's own choice for the GPU: XLA's, a block of queries at a time.

Without a GPU it says so and measures nothing. Where torch is missing or sees no GPU, ours is measured alone.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from common import (
  Effort,
  Goal,
  effort_from_arguments,
  finish,
  in_turns,
  median_ratio,
  say,
  seconds_of,
)
from our_step import EXIT_WEIGHT, OPTIMIZER, TORCH_OPTIMIZER, OurTrainer, make_batch

from exitax.commands import gin_config
from exitax.data import Batch, DataConfig
from exitax.models import ExitConfig, ExitLM, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig, exit_objective
from exitax.parallel import Chip, MeshConfig, ShardingRules, count_flops, find_chip, make_mesh, use
from exitax.planning import estimate
from exitax.training import LoopConfig, RunConfig

ROWS = 4  # EE-LLM's microbatch of this model.
LAYER_STEP = 4  # So that exits stay after a quarter and a half of the layers.
# Of the memory; the rest is for what is not counted: libraries, fragments.
USABLE = 0.9
TOLERANCE = 1e-2  # Of the first losses, which bfloat16 rounds differently.
_UNREAD = {'MODEL_DIR': 'unused', 'MIXTURE_OR_TASK_NAME': 'unused', 'TRAIN_STEPS': 1}


def main() -> None:
  """Measures, and prints table, goals and JSON."""
  effort = effort_from_arguments(__doc__)
  # Before jax starts: it would take three quarters of the memory at once, and torch needs some.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  device = jax.devices()[0]
  if device.platform != 'gpu':
    print(f'jax sees no GPU here, only {device.device_kind}: nothing is measured')
    finish('train_gpu', [], goals(None, None))
    return
  chip = find_chip(device.device_kind)
  if chip is None:
    print(f'no data sheet of {device.device_kind} in exitax.parallel.CHIPS: no MFU')
  missing = why_no_torch()
  if missing:
    print(f'{missing}: exitax is measured alone')
  memory = chip.hbm_bytes if chip else device.memory_stats()['bytes_limit']
  repeats = 5 if effort is Effort.QUICK else 15
  config = model_config()
  with_torch = not missing
  sizes = layer_counts(config.num_layers)
  fitting = choose_layers(
    lambda n: needed_bytes(shrink(config, n), with_torch), USABLE * memory, sizes
  )
  # Arithmetic is not the allocator: whoever runs out of memory after all loses four more layers.
  for num_layers in (n for n in sizes if n <= fitting):
    found = compare(shrink(config, num_layers), chip, with_torch=with_torch, repeats=repeats)
    if found:
      finish('train_gpu', *found)
      return
  raise SystemExit(f'{device.device_kind}: not even {sizes[-1]} layers fit')


def model_config() -> ModelConfig:
  """gin/models/ee_1p3b.gin."""
  text = "include 'runs/pretrain.gin'"
  gin_config.parse(['models/ee_1p3b.gin'], [], text=text, if_required=_UNREAD)
  return gin_config.build(RunConfig).model


def shrink(config: ModelConfig, num_layers: int) -> ModelConfig:
  """The model with fewer layers; exits of the same kind after a quarter and a half of them."""
  kept = zip(config.exits, (num_layers // 4, num_layers // 2), strict=True)
  exits = tuple(ExitConfig(layer=n, head=item.head, matrix=item.matrix) for item, n in kept)
  return dataclasses.replace(config, num_layers=num_layers, exits=exits)


def layer_counts(most: int) -> list[int]:
  """Numbers of layers to try, most first."""
  return list(range(most - most % LAYER_STEP, 0, -LAYER_STEP))


def choose_layers(bytes_of: Callable[[int], float], budget: float, sizes: Sequence[int]) -> int:
  """The first of `sizes` that takes no more than the budget; the last if none does."""
  return next((n for n in sizes if bytes_of(n) <= budget), sizes[-1])


def needed_bytes(config: ModelConfig, with_torch: bool) -> float:
  """Of both sides at once, by arithmetic, for the device that jax uses here."""
  run = RunConfig(
    model=config,
    data=DataConfig(batch_size=ROWS, length=config.max_length),
    loop=LoopConfig(train_steps=1),
    objective=_objective(config),
    mesh=MeshConfig(data=1),
  )
  with use(make_mesh(run.mesh, jax.devices()[:1]), run.sharding):
    ours = estimate(run, 1, None).memory.total
  return ours + (torch_bytes(config) if with_torch else 0)


def torch_bytes(config: ModelConfig) -> float:
  """What a compiled step under autocast takes: counted tensor by tensor, as torch keeps them."""
  tokens = ROWS * config.max_length
  num_params = sum(x.size for x in jax.tree.leaves(ExitLM(config).abstract_params()))
  # Weights, gradients and two moments in 4 bytes, autocast's copies in 2.
  state = 18 * num_params
  # Two norms: the stream in 4 bytes, the result in 2. Query, key, value, the first two once more
  # rotated, attention's result. Gate, up, the activation and the product.
  layer = 12 * config.embed_dim + 12 * config.embed_dim + 8 * config.mlp_dim
  # Logits of every exit in 2 and 4 bytes until its backward; that needs as much again, one at a time.
  scores = 6 * config.vocab_size * (len(config.exits) + 2)
  return state + tokens * (config.num_layers * layer + scores)


def model_flops(config: ModelConfig, batch: Batch) -> int:
  """Forward and backward of one batch, nothing computed twice."""
  objective = _objective(config)

  def loss(params: Any, batch: Any) -> Any:
    return exit_objective(model, params, batch, objective.weights_at(0), config=objective)[0]

  model = ExitLM(config)
  # As the CPU would run it, which keeps attention's weights where the GPU computes them again.
  with use(make_mesh(MeshConfig(data=1), jax.devices('cpu')[:1]), ShardingRules()):
    return count_flops(jax.grad(loss), model.abstract_params(), batch).flops


def why_no_torch() -> str:
  """What keeps torch + transformers from being measured; empty if nothing does."""
  for name in ('torch', 'transformers'):
    if importlib.util.find_spec(name) is None:
      return f'{name} is not installed'
  import torch

  if not torch.cuda.is_available():
    return f'torch {torch.__version__} sees no GPU (a build without CUDA?)'
  return ''


def compare(
  config: ModelConfig, chip: Chip | None, *, with_torch: bool, repeats: int
) -> tuple[list[dict[str, Any]], list[Goal]] | None:
  """Rows and goals; None if the memory does not suffice."""
  say(f'{config.num_layers} layers: making weights')
  params = jax.device_get(ExitLM(config).init(jax.random.key(0)))
  batch = make_batch(ROWS, length=config.max_length, vocab_size=config.vocab_size)
  try:
    return measure(
      config, params, batch, chip, device='cuda' if with_torch else None, repeats=repeats
    )
  except Exception as error:
    if not is_out_of_memory(error):
      raise
    say(f'{config.num_layers} layers do not fit: {str(error).splitlines()[0]}')
  # Only after the error, which holds on to the frames it went through, is gone.
  gc.collect()
  if with_torch:
    import torch

    torch.compiler.reset()  # Compiled code knows its model.
    torch.cuda.empty_cache()
  return None


def is_out_of_memory(error: Exception) -> bool:
  """XLA's error or torch's."""
  text = str(error)
  return 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower()


def measure(
  config: ModelConfig,
  params: Any,
  batch: Batch,
  chip: Chip | None,
  *,
  device: str | None,
  repeats: int,
) -> tuple[list[dict[str, Any]], list[Goal]]:
  """Rows and goals of one size; torch runs on `device`, None leaves it out."""
  flops = model_flops(config, batch)
  say('compiling exitax')
  ours = OurTrainer(config, params, batch)
  first = {'exitax': ours.step()}
  measures = {'exitax': lambda: seconds_of(ours.step)}
  if device:
    from early_exit_twin import TorchExitTrainer
    from llama_twin import TorchMode

    say('compiling torch')
    theirs = TorchExitTrainer(
      config,
      params,
      np.asarray(batch.tokens),
      np.asarray(batch.targets),
      mode=TorchMode(attention='sdpa', compiled=True, bfloat16=True),
      device=device,
      exit_weight=EXIT_WEIGHT,
      optimizer=TORCH_OPTIMIZER,
      weight_decay=OPTIMIZER.weight_decay,
    )
    name = theirs.mode.name
    first[name] = theirs.step()
    np.testing.assert_allclose(first[name], first['exitax'], rtol=TOLERANCE)
    measures[name] = lambda: seconds_of(theirs.step)
  for act in measures.values():  # The first steps choose kernels and grow the allocators' pools.
    act()
  seconds = in_turns(measures, repeats)
  mfu, rows = {}, []
  for name, values in seconds.items():
    median = statistics.median(values)
    mfu[name] = flops / median / chip.bf16_flops if chip else None
    rows.append(
      {
        'contender': name,
        'device': jax.devices()[0].device_kind,
        'layers': config.num_layers,
        'rows': len(batch.tokens),
        'tokens_per_s': batch.tokens.size / median,
        'ms': median * 1e3,
        'tflop': flops / 1e12,
        'mfu': mfu[name],
        'loss': first[name],
        'repeats': repeats,
      }
    )
  others = [name for name in seconds if name != 'exitax']
  vs_torch = median_ratio(seconds[others[0]], seconds['exitax']) if others else None
  return rows, goals(mfu['exitax'], vs_torch)


def goals(mfu: float | None, vs_torch: float | None) -> list[Goal]:
  """Both goals; None is not measured."""
  return [
    Goal(name='mfu', value=mfu, op='>=', goal=0.5),
    Goal(name='vs_torch', value=vs_torch, op='>=', goal=1.0),
  ]


def _objective(config: ModelConfig) -> ObjectiveConfig:
  return ObjectiveConfig(exit_weights=(ExitWeight(start=EXIT_WEIGHT),) * len(config.exits))


if __name__ == '__main__':
  main()
