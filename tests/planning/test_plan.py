"""Plans: compiled here, compiled for TPUs that are not here, and what does not fit."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.colors import to_rgb
from rich.console import Console

from exitax import parallel, planning
from exitax.errors import UserError
from exitax.parallel import MeshConfig, fill_bubbles, has_tpu_compiler, make_schedule
from exitax.planning import compiled as compiled_module
from exitax.planning import target as target_module
from exitax.training import PipelineConfig
from tests.planning.tiny_run import tiny_run

V5E = parallel.find_chip('TPU v5e')
needs_compiler = pytest.mark.skipif(
  not has_tpu_compiler(), reason='the TPU compiler is not installed: pip install "exitax[plan]"'
)
RUN = tiny_run(
  mesh=MeshConfig(2, 2, 2), pipeline=PipelineConfig(num_microbatches=4, recompute='layer')
)


def _text(renderable, width=120):
  console = Console(width=width, record=True, file=io.StringIO())
  console.print(renderable)
  return console.export_text()


@pytest.fixture(scope='module')
def here():
  return planning.make_plan(RUN, planning.Target('8 x cpu', tuple(jax.devices()), V5E))


@pytest.mark.slow
def test_a_plan_here(here):
  compiled = here.compiled
  assert here.fits
  assert here.memory_bytes == compiled.memory.total
  assert compiled.flops.flops == pytest.approx(here.estimate.executed_flops * 8)
  over = {(item.kind, item.axes) for item in compiled.collectives}
  assert ('collective-permute', ('pipeline',)) in over
  assert ('reduce-scatter', ('data',)) in over
  assert any(axes == ('tensor',) for _, axes in over)
  # Five forwards reach a neighbour and five gradients come back: the table's ticks.
  table = here.schedule
  ticks = table.forward.busy.any(axis=1).sum() + table.backward.busy.any(axis=1).sum()
  permutes = sum(
    item.count
    for item in compiled.collectives
    if item.kind == 'collective-permute' and item.axes == ('pipeline',)
  )
  # What the last tick sends is read by nobody, and dropped where its loop is unrolled.
  assert ticks - 1 <= permutes <= ticks
  plain = json.loads(json.dumps(here.to_dict(), default=str))
  assert plain['mesh'] == {'data': 2, 'pipeline': 2, 'tensor': 2}
  assert plain['estimate']['memory']['parameters'] > 0


@pytest.mark.slow
def test_a_plan_in_words(here):
  text = _text(planning.render_plan(here))
  for wanted in (
    '6 layers of 32, exits after layers: 2, 4',
    'data=2 x pipeline=2 x tensor=2, 1f1b, 4 microbatches, recompute layer, scores by pipeline',
    'fits: 0% of 16.0 GiB',
    'pipeline bubble',
    'collectives over tensor',
    'stage 0  f0 f1',
    'stage 1  .  f0b0',
  ):
    assert wanted in text


@needs_compiler
@pytest.mark.slow
def test_a_plan_for_tpus_that_are_not_here():
  run = tiny_run(mesh=MeshConfig(1, 2, 2), pipeline=PipelineConfig(num_microbatches=2))
  target = planning.find_target('v5e:2x2')
  assert (target.platform, target.chip, target.note) == ('tpu', V5E, '')
  plan = planning.make_plan(run, target)
  assert plan.fits
  assert plan.compiled.num_rematerialised == 0
  assert plan.compiled.flops.flops == pytest.approx(plan.estimate.executed_flops * 4)
  over = {(item.kind, item.axes) for item in plan.compiled.collectives}
  assert ('collective-permute', ('pipeline',)) in over
  assert 'compiled for tpu' in _text(planning.render_plan(plan))


@needs_compiler
def test_what_the_compiler_says_of_too_little_memory_is_understood():
  devices = parallel.tpu_devices(parallel.parse_topology('v5e:2x2'))
  mesh = Mesh(np.asarray(devices[:1]), ('x',))
  huge = jax.ShapeDtypeStruct(
    (1 << 17, 1 << 17), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
  )
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.jit(lambda x: jnp.sort(x, axis=0) + 1).lower(huge).compile()
  needed, available = compiled_module._out_of_memory(caught.value)
  assert needed > 2**36
  assert available == round(15.75 * 2**30)


def test_the_other_form_of_that_message():
  error = jax.errors.JaxRuntimeError(
    'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.00G of 15.75G hbm. '
    'Exceeded hbm capacity by 24.25G.'
  )
  assert compiled_module._out_of_memory(error) == (40 * 2**30, round(15.75 * 2**30))
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    compiled_module._out_of_memory(jax.errors.JaxRuntimeError('INTERNAL: other'))


def _too_large(here):
  memory = dataclasses.replace(here.estimate.memory, kept=40 * 2**30)
  compiled = dataclasses.replace(
    here.compiled, memory=None, needed=40 * 2**30, available=15 * 2**30, collectives=()
  )
  estimate = dataclasses.replace(here.estimate, memory=memory)
  return dataclasses.replace(here, estimate=estimate, compiled=compiled)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would(here):
  plan = _too_large(here)
  assert not plan.fits
  assert plan.missing_bytes == 25 * 2**30
  remedy = planning.search(RUN, here.target, num_compiled=0).ranked[0]
  text = _text(planning.render_plan(plan, (remedy,)))
  assert 'does not fit: 25.0 GiB more than the 15.0 GiB there are' in text
  assert planning.describe_layout(remedy.run) in text
  assert 'take a larger slice' in _text(planning.render_plan(plan))


def test_without_the_tpu_compiler_devices_are_emulated(monkeypatch):
  asked = []
  monkeypatch.setattr(target_module, 'has_tpu_compiler', lambda: False)
  monkeypatch.setattr(target_module, 'emulate_devices', asked.append)
  target = planning.find_target('v5e:2x4')
  assert asked == [8]
  assert (target.platform, target.chip, len(target.devices)) == ('cpu', V5E, 8)
  assert 'pip install "exitax[plan]"' in target.note


def test_devices_that_are_here_may_borrow_a_data_sheet():
  assert planning.find_target(None).chip is None
  assert planning.find_target(None, 'tpu v5E').chip == V5E
  with pytest.raises(UserError, match="--chip='TPU v99' is unknown: choose TPU v4, TPU v5e"):
    planning.find_target(None, 'TPU v99')


def test_the_picture_shows_every_piece_of_work():
  filled = fill_bubbles(
    make_schedule('1f1b', num_stages=4, num_microbatches=4), backward_over_forward=2.0
  )
  (ax,) = planning.draw_schedules([filled]).axes
  assert len(ax.patches) == 2 * 4 * 4 + 2 * 2
  assert {text.get_text() for text in ax.texts} == set('012345')
  tables = [
    make_schedule('gpipe', num_stages=2, num_microbatches=4),
    make_schedule('interleaved', num_stages=2, num_microbatches=4, num_chunks=2),
  ]
  figure = planning.draw_schedules(tables)
  for ax, table in zip(figure.axes, tables, strict=True):
    pieces = table.forward.busy.sum() + table.backward.busy.sum()
    assert len(ax.patches) == pieces
    # On one scale of time, which ends with the longest.
    assert ax.get_xlim()[1] == pytest.approx(max(t.time() / t.num_chunks for t in tables))
    assert {text.get_text() for text in ax.texts} == {'0', '1', '2', '3'}
    # Nothing lies on anything else.
    for stage in range(2):
      spans = sorted(
        (patch.get_x(), patch.get_x() + patch.get_width())
        for patch in ax.patches
        if round(patch.get_y() + 0.42) == stage
      )
      assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
  colours = {to_rgb(patch.get_facecolor()) for patch in figure.axes[1].patches}
  assert len(colours) == 4  # Forward and backward of two chunks.
  assert planning.to_png(figure).startswith(b'\x89PNG')


def test_the_timeline_in_a_terminal_shows_as_many_ticks_as_fit():
  table = make_schedule('1f1b', num_stages=2, num_microbatches=12)
  lines = _text(planning.render_timeline(table, width=40)).splitlines()
  assert 'the first' in lines[0]
  assert lines[1].startswith('stage 0  f0 f1')
  assert lines[2].startswith('stage 1  .  f0b0 f1b1')
  assert all(len(line) <= 50 for line in lines[1:])
  whole = _text(planning.render_timeline(table, width=200), width=220)
  assert 'the first' not in whole
  assert 'b11' in whole
