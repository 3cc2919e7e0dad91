"""Loss and every gradient leaf over a mesh against one device: the product of what a pipeline can be.

  python benchmarks/pipeline_exactness.py [--quick | --full]

Factorisations of eight emulated devices x GPipe, 1F1B, interleaved x exits (none, in the middle, at
a boundary, all four heads) x tied and own matrices x scores by stage and by pipeline x the four ways
of recomputation: 1664 cases (eight layers leave no two spans for each of eight stages), and the
float64 ones on 1, 2 and 4 stages. Without --full a selection is taken in which every pair of values
meets, and every 40th of the others. Errors are relative to the largest entry of a leaf.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import numpy as np
from common import Effort, Goal, effort_from_arguments, finish, say

from exitax.data import Batch
from exitax.layers import HeadKind, Precision
from exitax.models import ExitConfig, ExitLM, ExitMatrix, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig, VocabPlacement, exit_objective
from exitax.parallel import (
  MeshConfig,
  ScheduleKind,
  ShardingRules,
  emulate_devices,
  make_mesh,
  shard_batch,
  tree_shardings,
  use,
)
from exitax.training import PipelineConfig, PipelinedObjective, Recompute

LENGTH, ROWS, VOCAB, LAYERS = 8, 8, 32, 8
QUICK = {'xla_backend_optimization_level': 0}  # Most of the time goes into compiling.
MESHES = (
  *((8, 1, 1), (4, 1, 2), (2, 1, 4)),
  *((4, 2, 1), (2, 2, 2), (1, 2, 4)),
  *((2, 4, 1), (1, 4, 2), (1, 8, 1)),
)
SCHEDULES = tuple(ScheduleKind)
EXITS = {
  'none': (),
  'middle': (ExitConfig(layer=3, head=HeadKind.NORM, matrix=ExitMatrix.INPUT),),
  'boundary': (ExitConfig(layer=4, head=HeadKind.MLP, matrix=ExitMatrix.OWN),),
  'all heads': (
    ExitConfig(layer=1, head=HeadKind.EMBEDDING, matrix=ExitMatrix.SHARED),
    ExitConfig(layer=2, head=HeadKind.NORM, matrix=ExitMatrix.FINAL),
    ExitConfig(layer=5, head=HeadKind.MLP, matrix=ExitMatrix.SHARED),
    ExitConfig(layer=6, head=HeadKind.LAYER, matrix=ExitMatrix.OWN),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One way to run the same batch."""

  mesh: tuple[int, int, int]
  schedule: ScheduleKind
  exits: str
  tied: bool
  vocab: VocabPlacement
  recompute: Recompute
  precision: Precision = Precision.FLOAT32


def main() -> None:
  """Runs the cases and prints the worst of each mesh and precision, goals and JSON."""
  effort = effort_from_arguments(__doc__)
  emulate_devices(8)
  narrow = selected_cases(effort)
  wide = wide_cases()[:: {Effort.QUICK: 8, Effort.NORMAL: 1, Effort.FULL: 1}[effort]]
  errors = run_all(narrow)
  with jax.enable_x64(True):
    wide_errors = run_all(wide)
  rows = []
  for name, cases, found in (('float32', narrow, errors), ('float64', wide, wide_errors)):
    for mesh in sorted({case.mesh for case in cases}):
      of_mesh = [e for case, e in zip(cases, found, strict=True) if case.mesh == mesh]
      shape = ' x '.join(map(str, mesh))
      rows.append({'mesh': shape, 'precision': name, 'cases': len(of_mesh), 'error': max(of_mesh)})
  finish(
    'pipeline_exactness',
    rows,
    [
      Goal(name='max_error_fp32', value=max(errors), op='<=', goal=1e-5),
      Goal(name='max_error_fp64', value=max(wide_errors), op='<=', goal=1e-10),
    ],
  )


def selected_cases(effort: Effort) -> list[Case]:
  """As many float32 cases as there is time for."""
  cases = narrow_cases()
  if effort is Effort.FULL:
    return cases
  if effort is Effort.QUICK:
    return cases[::170]
  pairs = all_pairs(cases)
  return [*pairs, *[case for case in cases if case not in pairs][::40]]


def all_pairs(cases: list[Case]) -> list[Case]:
  """A few of the cases in which every two values meet that meet in any, the most telling first."""
  missing = set().union(*(pairs_of(case) for case in cases))
  chosen = []
  while missing:
    best = max(cases, key=lambda case: len(pairs_of(case) & missing))
    chosen.append(best)
    missing -= pairs_of(best)
  return chosen


def pairs_of(case: Case) -> frozenset[tuple[str, str]]:
  """Every two settings of a case."""
  settings = [f'{name}={value}' for name, value in dataclasses.asdict(case).items()]
  return frozenset(itertools.combinations(settings, 2))


def narrow_cases() -> list[Case]:
  """The full product, in an order in which neighbours have nothing in common."""
  product = itertools.product(MESHES, SCHEDULES, EXITS, (True, False), VocabPlacement, Recompute)
  cases = [
    Case(mesh=mesh, schedule=schedule, exits=exits, tied=tied, vocab=vocab, recompute=recompute)
    for mesh, schedule, exits, tied, vocab, recompute in product
    if not (schedule is ScheduleKind.INTERLEAVED and 2 * mesh[1] > LAYERS)
  ]
  # Without an order of its own a stride would meet the same values of the last factors.
  order = np.random.default_rng(0).permutation(len(cases))
  return [cases[i] for i in order]


def wide_cases() -> list[Case]:
  """Float64: 1, 2 and 4 stages with everything that adds up across stages."""
  return [
    Case(
      mesh=(1, stages, 1),
      schedule=schedule,
      exits='all heads',
      tied=tied,
      vocab=vocab,
      recompute=recompute,
      precision=Precision.FLOAT64,
    )
    for stages, schedule, tied, (vocab, recompute) in itertools.product(
      (1, 2, 4),
      SCHEDULES,
      (True, False),
      ((VocabPlacement.STAGE, Recompute.STAGE), (VocabPlacement.PIPELINE, Recompute.NONE)),
    )
  ]


def run_all(cases: list[Case]) -> list[float]:
  """The error of each case."""
  errors = []
  for number, case in enumerate(cases):
    errors.append(error_of(case))
    if number % 10 == 0:
      say(f'{number + 1} of {len(cases)} cases, largest error {max(errors):.1e}')
  return errors


def error_of(case: Case) -> float:
  """Largest error of the loss and of any gradient leaf."""
  model = make_model(case.exits, case.tied, case.precision)
  (wanted_loss, wanted), (loss, grads) = one_device(model), over_mesh(case, model)
  errors = [abs(loss / wanted_loss - 1)]
  for left, right in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
    errors.append(float(np.abs(left - right).max() / np.abs(right).max()))
  if not all(map(math.isfinite, errors)):
    raise SystemExit(f'{case}: a gradient is not finite, or zero on one device')
  return max(errors)


@functools.cache
def make_model(exits: str, tied: bool, precision: Precision) -> ExitLM:
  """Eight layers, so that interleaving has spans of one and two."""
  return ExitLM(
    ModelConfig(
      vocab_size=VOCAB,
      num_layers=LAYERS,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      mlp_dim=24,
      max_length=LENGTH,
      qk_norm=True,
      qkv_bias=True,
      tie_embeddings=tied,
      exits=EXITS[exits],
      precision=precision,
    )
  )


def objective_of(model: ExitLM) -> ObjectiveConfig:
  """Another weight for every exit, and a z-loss."""
  weights = tuple(ExitWeight(start=0.25 * (i + 1)) for i in range(len(model.config.exits)))
  return ObjectiveConfig(exit_weights=weights, z_loss=1e-2, chunk_length=4)


def params_of(model: ExitLM) -> Any:
  """Larger than at the start of training, so that every path counts."""
  rng = np.random.default_rng(1)
  wide = np.float64 if model.config.precision is Precision.FLOAT64 else np.float32

  def draw(path: Any, leaf: Any) -> np.ndarray:
    return ((path[-1].key == 'scale') + 0.2 * rng.normal(size=leaf.shape)).astype(wide)

  return jax.tree.map_with_path(draw, model.abstract_params())


def make_batch() -> Any:
  """Packed rows that count different numbers of tokens, one of them padded."""
  rng = np.random.default_rng(0)
  ids = np.ones((ROWS, LENGTH), np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  ids[::2, 3:], positions[::2, 3:] = 2, np.arange(LENGTH - 3)
  ids[1, 5:], positions[1, 5:] = 0, 0
  weights = (ids > 0) * (rng.random(ids.shape) < np.linspace(0.2, 1, ROWS)[:, None])
  tokens, targets = rng.integers(0, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
  return Batch(tokens, targets, ids, positions, weights.astype(np.float32))


@functools.cache
def one_device(model: ExitLM) -> tuple[float, Any]:
  """Loss and gradients by autodiff of the whole model."""
  objective = objective_of(model)

  def loss(params: Any) -> Any:
    weights = objective.weights_at(0)
    return exit_objective(model, params, make_batch(), weights, config=objective)

  program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
  (value, _), grads = jax.device_get(program(params_of(model)))
  return float(value), grads


def over_mesh(case: Case, model: ExitLM) -> tuple[float, Any]:
  """Loss and gradients through the executor."""
  rules, objective = ShardingRules(), objective_of(model)
  mesh = make_mesh(MeshConfig(*case.mesh), jax.devices()[: math.prod(case.mesh)])
  interleaved = case.schedule is ScheduleKind.INTERLEAVED
  config = PipelineConfig(
    schedule=case.schedule,
    num_microbatches=min(4, ROWS // case.mesh[0]),
    num_chunks=2 if interleaved else 1,
    recompute=case.recompute,
    vocab=case.vocab,
  )
  with use(mesh, rules):
    pipelined = PipelinedObjective(model, mesh, rules, objective=objective, pipeline=config)
    params = params_of(model)
    layout = tree_shardings(params, model.logical_axes(), mesh, rules)
    arguments = jax.block_until_ready(
      (
        jax.device_put(params, layout),
        shard_batch(make_batch(), mesh, rules),
        objective.weights_at(0),
      )
    )
    step = jax.jit(pipelined.value_and_grad, compiler_options=QUICK)
    (value, _), grads = jax.device_get(jax.block_until_ready(step(*arguments)))
  return float(value), grads


if __name__ == '__main__':
  main()
