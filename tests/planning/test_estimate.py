"""Estimates against what they estimate: the traced program, the tables, the compiler."""

from __future__ import annotations

import jax
import pytest

from exitax import parallel
from exitax.errors import UserError
from exitax.models import ExitConfig, ExitMatrix, Remat
from exitax.parallel import MeshConfig, ScheduleKind, count_flops, make_mesh, make_schedule
from exitax.planning import compile_step, costs, estimate
from exitax.planning.layout import num_slots
from exitax.training import PipelineConfig, Recompute, assemble
from tests.planning.tiny_run import tiny_run

V5E = parallel.find_chip('TPU v5e')


def _estimated(run):
  with parallel.use(_one_device(), run.sharding):
    found = estimate(run, 8, V5E)
  return found, assemble(run, make_mesh(run.mesh))


def _one_device():
  return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def _pipeline(**changes):
  return PipelineConfig(**({'num_microbatches': 4, 'recompute': 'layer'} | changes))


LAYOUTS = {
  'one stage': tiny_run(mesh=MeshConfig(data=8)),
  'one stage in parts': tiny_run(mesh=MeshConfig(data=4, tensor=2), accumulation_steps=2),
  'one stage, remat': tiny_run(mesh=MeshConfig(data=8), remat=Remat.FULL),
  'none': tiny_run(mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(recompute='none')),
  'selective': tiny_run(mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(recompute='selective')),
  'layer': tiny_run(mesh=MeshConfig(2, 2, 2), pipeline=_pipeline()),
  'stage': tiny_run(mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(recompute='stage')),
  'gpipe': tiny_run(mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(schedule='gpipe')),
  'chunks': tiny_run(
    mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(schedule='interleaved', num_chunks=3)
  ),
  'scores by stage': tiny_run(mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(vocab='stage')),
  'own matrices': tiny_run(
    mesh=MeshConfig(2, 2, 2), matrix=ExitMatrix.OWN, pipeline=_pipeline(vocab='pipeline')
  ),
  'uneven stages': tiny_run(
    mesh=MeshConfig(2, 4, 1), pipeline=_pipeline(layers_per_span=(2, 2, 1, 1))
  ),
  'partial microbatches': tiny_run(
    mesh=MeshConfig(1, 4, 2),
    pipeline=_pipeline(vocab='stage', bubble_filling_ratio=2.0),
    batch_size=12,
    exits=(ExitConfig(layer=1), ExitConfig(layer=4)),
  ),
  'several parts': tiny_run(
    mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(num_microbatches=2), accumulation_steps=4
  ),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_executed_flops_are_those_of_the_traced_step(name):
  run = LAYOUTS[name]
  found, assembly = _estimated(run)
  with parallel.use(assembly.mesh, run.sharding):
    counted = count_flops(assembly.step, assembly.abstract_state(), assembly.abstract_batch())
  assert counted.num_open_loops == 0
  assert found.executed_flops * 8 == pytest.approx(counted.flops, rel=1e-9)


def test_model_flops_are_those_of_one_device_without_recomputation():
  run = tiny_run(mesh=MeshConfig(data=1))
  mesh = make_mesh(run.mesh, jax.devices()[:1])
  assembly = assemble(run, mesh)
  with parallel.use(mesh, run.sharding):
    found = estimate(run, 1, V5E)
    counted = count_flops(assembly.step, assembly.abstract_state(), assembly.abstract_batch())
  assert found.model_flops == pytest.approx(counted.flops, rel=1e-9)


@pytest.mark.parametrize('kind', ScheduleKind)
@pytest.mark.parametrize('stages', [2, 3, 4, 8])
def test_slots_of_long_steps_are_those_of_their_tables(kind, stages):
  chunks = 3 if kind is ScheduleKind.INTERLEAVED else 1
  for microbatches in (1, 2, 4, stages, 4 * stages, 24, 96):
    if chunks > 1 and microbatches % stages:
      continue  # Interleaving needs a multiple of the stages.
    table = make_schedule(kind, num_stages=stages, num_microbatches=microbatches, num_chunks=chunks)
    assert num_slots(kind, stages, microbatches, chunks) == table.num_slots + 1


@pytest.mark.parametrize('name', [name for name in LAYOUTS if not name.startswith('one stage')])
def test_bubble_is_that_of_the_table(name):
  found, assembly = _estimated(LAYOUTS[name])
  table = assembly.pipelined.schedule
  if table.extra_depths:  # Of a step whose bubble is filled, the estimate names the bubble before.
    table = make_schedule('1f1b', num_stages=4, num_microbatches=4)
  assert found.bubble == pytest.approx(table.bubble_fraction())


@pytest.mark.parametrize('recompute', Recompute)
def test_costs_of_long_spans_are_those_of_their_traces(recompute):
  run = tiny_run(mesh=MeshConfig(data=8))
  with parallel.use(_one_device(), run.sharding):
    sizes = {'length': 16, 'recompute': recompute}
    extrapolated = costs.span_cost(run.model, num_layers=5, num_taps=1, **sizes)
    traced = costs.traced_cost(run.model, 5, **sizes, target='cpu')
  assert extrapolated == traced


# Wide enough for arrays to outweigh what the compiler needs besides.
WIDE = {
  'vocab_size': 1024,
  'embed_dim': 128,
  'mlp_dim': 384,
  'num_layers': 8,
  'max_length': 16,
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'pipeline',
  [
    _pipeline(recompute='none', num_microbatches=8),
    _pipeline(recompute='layer', num_microbatches=8),
    _pipeline(recompute='none', num_microbatches=8, schedule='gpipe'),
  ],
  ids=['none', 'layer', 'gpipe'],
)
def test_memory_is_near_what_the_compiler_finds(pipeline):
  """State exactly; temporary memory, which no arithmetic knows to the byte, within a third."""
  run = tiny_run(mesh=MeshConfig(2, 4, 1), pipeline=pipeline, batch_size=128, **WIDE)
  found, assembly = _estimated(run)
  compiled = compile_step(assembly)
  batch = 5 * 128 * 16 * 4 // 2
  state = found.memory.parameters + found.memory.optimizer
  assert compiled.memory.arguments == pytest.approx(state + batch, rel=1e-3)
  temporary = found.memory.total - state
  assert temporary == pytest.approx(compiled.memory.temporary, rel=0.33)


def test_more_recomputation_takes_less_memory_and_more_flops():
  by_mode = {}
  for mode in Recompute:
    found, _ = _estimated(tiny_run(mesh=MeshConfig(2, 2, 2), pipeline=_pipeline(recompute=mode)))
    by_mode[mode] = found
  kept = [by_mode[mode].memory.kept for mode in Recompute]
  assert kept == sorted(kept, reverse=True)
  assert len(set(kept)) == len(kept)
  assert by_mode[Recompute.NONE].executed_flops < by_mode[Recompute.LAYER].executed_flops


def test_time_and_utilisation_follow_from_the_parts():
  found, _ = _estimated(LAYOUTS['layer'])
  time = found.time
  # Tick by tick the larger of the two is no less than either in all.
  assert time.compute >= max(time.arithmetic, time.traffic) * (1 - 1e-9)
  assert set(time.links) == {'data', 'pipeline', 'tensor'}
  assert time.step == pytest.approx(time.compute + sum(time.links.values()))
  assert found.mfu == pytest.approx(found.model_flops / (time.step * 8 * V5E.bf16_flops))


def test_a_mesh_that_does_not_suit_is_refused():
  run = tiny_run(mesh=MeshConfig(data=1, pipeline=8), pipeline=_pipeline())
  with pytest.raises(UserError, match='pipeline=8 is more than num_layers=6'):
    _estimated(run)
