"""The search: everything tried, the fastest that fits first, written so that a run can read it."""

from __future__ import annotations

import dataclasses

import jax
import pytest

import gin
from exitax import parallel
from exitax.commands import gin_config
from exitax.errors import UserError
from exitax.parallel import MeshConfig
from exitax.planning import (
  COMFORTABLE,
  Target,
  describe_layout,
  gin_bindings,
  layouts,
  rank_layouts,
  search,
  smallest_slice,
)
from exitax.training import RunConfig
from tests.planning.tiny_run import tiny_run

V5E = parallel.find_chip('TPU v5e')
RUN = tiny_run(mesh=MeshConfig(data=-1))


def _target(chip=V5E):
  return Target('8 x cpu', tuple(jax.devices()), chip)


@pytest.fixture(scope='module')
def found():
  return search(RUN, _target(), num_compiled=0)


def test_meshes_schedules_microbatches_and_recomputation_are_tried(found):
  runs = [candidate.run for candidate in found.ranked]
  assert found.num_tried == len(runs) > 200
  meshes = {(r.mesh.data, r.mesh.pipeline, r.mesh.tensor) for r in runs}
  assert {(8, 1, 1), (2, 2, 2), (1, 4, 2), (2, 4, 1), (2, 1, 4)} <= meshes
  assert all(data * stages * tensor == 8 for data, stages, tensor in meshes)
  # Six layers have no eight stages, four heads no eight shards.
  assert not any(stages == 8 or tensor == 8 for _, stages, tensor in meshes)
  staged = [r.pipeline for r in runs if r.mesh.pipeline > 1]
  assert {p.schedule.value for p in staged} == {'gpipe', '1f1b', 'interleaved'}
  assert {p.recompute.value for p in staged} == {'none', 'selective', 'layer', 'stage'}
  assert {p.vocab.value for p in staged} == {'stage', 'pipeline'}
  assert {p.num_microbatches for p in staged} >= {2, 4, 8, 16}


def test_the_batch_stays_and_every_layout_is_another(found):
  for candidate in found.ranked:
    run = candidate.run
    assert (run.data, run.objective, run.optimizer) == (RUN.data, RUN.objective, RUN.optimizer)
    assert dataclasses.replace(run.model, remat=RUN.model.remat) == RUN.model
  assert len({describe_layout(c.run) for c in found.ranked}) == len(found.ranked)


def test_fastest_first(found):
  steps = [candidate.estimate.time.step for candidate in found.ranked]
  assert steps == sorted(steps)


def test_what_does_not_fit_is_left_out():
  everything = search(RUN, _target(), num_compiled=0).ranked
  sizes = sorted(candidate.estimate.memory.total for candidate in everything)
  middle = sizes[len(sizes) // 2]
  small = dataclasses.replace(V5E, hbm_bytes=round(middle / COMFORTABLE))
  fitting = search(RUN, _target(small), num_compiled=0)
  assert fitting.num_tried == len(everything)
  assert 0 < len(fitting.ranked) < len(everything)
  assert all(c.estimate.memory.total <= middle for c in fitting.ranked)


def test_where_nothing_fits_the_smallest_come_first():
  result = search(RUN, _target(dataclasses.replace(V5E, hbm_bytes=1)), num_compiled=0)
  sizes = [candidate.estimate.memory.total for candidate in result.ranked]
  assert sizes == sorted(sizes)
  assert len(sizes) == result.num_tried
  assert not result.fits
  assert not result.is_comfortable


def test_nothing_is_compiled_where_nothing_fits():
  def refuse(number, candidate):
    raise AssertionError('compiling')

  small = _target(dataclasses.replace(V5E, hbm_bytes=1))
  assert search(RUN, small, num_compiled=1, on_compile=refuse).plans == ()


def test_the_smallest_slice_that_would_do():
  one = dataclasses.replace(_target(), topology=parallel.parse_topology('v5e:1x1'))
  needed = {n: _least_memory(rank_layouts(RUN, one, num_devices=n)) for n in (1, 4, 8)}
  assert needed[1] > needed[4] > needed[8]
  limited = dataclasses.replace(one, chip=dataclasses.replace(V5E, hbm_bytes=needed[4]))
  assert not rank_layouts(RUN, limited, num_devices=1).fits
  topology, candidate = smallest_slice(RUN, limited)
  assert str(topology) == 'v5e:2x2'
  assert candidate.estimate.memory.total == needed[4]
  nothing = dataclasses.replace(one, chip=dataclasses.replace(V5E, hbm_bytes=1))
  assert smallest_slice(RUN, nothing) is None
  assert smallest_slice(RUN, _target()) is None  # Devices that are here are no slice.


def _least_memory(result):
  return min(candidate.estimate.memory.total for candidate in result.ranked)


@pytest.mark.slow
def test_the_best_few_are_compiled():
  told = []
  result = search(
    RUN,
    _target(),
    num_compiled=1,
    on_ranked=lambda ranking: told.append(ranking.plans),
    on_compile=lambda number, candidate: told.append(number),
    on_compiled=lambda number, plan: told.append(plan),
  )
  (plan,) = result.plans
  assert told == [(), 0, plan]
  assert plan.run == result.ranked[0].run
  assert plan.compiled.memory.total > plan.estimate.memory.parameters
  assert result.best is plan
  assert plan.fits
  assert plan.share < COMFORTABLE


def test_a_layout_is_written_as_gin_that_a_run_reads(found):
  kinds = {(c.run.mesh.pipeline > 1, c.run.pipeline.schedule) for c in found.ranked}
  for kind in kinds:
    layout = next(
      c.run for c in found.ranked if (c.run.mesh.pipeline > 1, c.run.pipeline.schedule) == kind
    )
    gin_config.parse(
      ['runs/quickstart.gin'], ["MODEL_DIR = 'unused'", *gin_bindings(layout).splitlines()]
    )
    read = gin_config.build(RunConfig)
    gin.clear_config()
    assert read.mesh == layout.mesh
    assert read.loop.accumulation_steps == layout.loop.accumulation_steps
    if layout.mesh.pipeline > 1:
      assert read.pipeline == layout.pipeline
    else:
      assert read.model.remat == layout.model.remat


def test_a_written_layout_undoes_spans_of_other_stages(found):
  layout = next(c.run for c in found.ranked if c.run.mesh.pipeline == 2)
  gin_config.parse(
    ['runs/quickstart.gin'],
    [
      "MODEL_DIR = 'unused'",
      'PipelineConfig.layers_per_span = (1, 1, 4)',
      *gin_bindings(layout).splitlines(),
    ],
  )
  read = gin_config.build(RunConfig)
  gin.clear_config()
  assert read.pipeline.layers_per_span is None


def test_a_search_needs_a_data_sheet():
  with pytest.raises(UserError, match='a search needs the data sheet of 8 x cpu: name a slice'):
    search(RUN, _target(None))


def test_a_batch_that_no_mesh_divides():
  run = tiny_run(mesh=MeshConfig(data=-1), batch_size=7, num_heads=1, num_layers=5)
  assert list(layouts(run, 64)) == []
  with pytest.raises(UserError, match='no layout of 8 devices suits 7 rows'):
    search(tiny_run(mesh=MeshConfig(data=-1), batch_size=7, num_heads=1), _target())
