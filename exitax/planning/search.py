"""Layouts of a run on a target, ranked: every one by arithmetic, the best few by the compiler."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from exitax.errors import UserError
from exitax.models import Remat
from exitax.objectives import VocabPlacement
from exitax.parallel import MeshConfig, ScheduleKind, Topology, divisors, larger_slices, use
from exitax.planning.estimate import Estimate, estimate
from exitax.planning.plan import COMFORTABLE, Plan, make_plan
from exitax.planning.target import Target
from exitax.training import Recompute, RunConfig

_ROWS = (1, 2, 4, 8, 16)
_CHUNKS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One layout and its estimate."""

  run: RunConfig
  estimate: Estimate


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """What a search has found.

  Attributes:
    limit: memory of a device.
    num_tried: layouts that suit model, batch and target.
    ranked: those whose estimated memory is comfortable, fastest first; those that are not, by
      memory, if none is.
    plans: the best of `ranked`, compiled, in the order of the ranking; none if nothing fits.
  """

  limit: int
  num_tried: int
  ranked: tuple[Candidate, ...]
  plans: tuple[Plan, ...] = ()

  @property
  def fits(self) -> bool:
    """Whether any layout fits, by estimate."""
    return self.ranked[0].estimate.memory.total <= self.limit

  @property
  def is_comfortable(self) -> bool:
    """Whether those that are ranked leave memory to spare, by estimate."""
    return self.ranked[0].estimate.memory.total <= COMFORTABLE * self.limit

  @property
  def best(self) -> Plan | None:
    """The fastest that the compiler found to fit comfortably, else to fit; None if none does."""
    comfortable = [p for p in self.plans if p.fits and (p.share or 0) <= COMFORTABLE]
    fitting = comfortable or [p for p in self.plans if p.fits]
    return fitting[0] if fitting else None


def search(
  run: RunConfig,
  target: Target,
  *,
  num_compiled: int = 3,
  on_ranked: Callable[[SearchResult], None] | None = None,
  on_compile: Callable[[int, Candidate], None] | None = None,
  on_compiled: Callable[[int, Plan], None] | None = None,
) -> SearchResult:
  """Tries mesh shapes, schedules, microbatches, recomputation and the scores' place.

  The batch, the model and everything else of the run stay.

  Args:
    run: the run; its mesh and pipeline are what is searched.
    target: devices with a data sheet: without one nothing tells fast from slow.
    num_compiled: how many of the best to compile, if any fits by estimate.
    on_ranked: told the ranking before anything is compiled, which takes far longer.
    on_compile: told before each compilation.
    on_compiled: told what it found.

  Raises:
    UserError: no data sheet, or nothing suits.
  """
  result = rank_layouts(run, target)
  if on_ranked:
    on_ranked(result)
  plans = []
  for number, candidate in enumerate(result.ranked[: num_compiled if result.fits else 0]):
    if on_compile:
      on_compile(number, candidate)
    plans.append(make_plan(candidate.run, target))
    if on_compiled:
      on_compiled(number, plans[-1])
  return dataclasses.replace(result, plans=tuple(plans))


def rank_layouts(run: RunConfig, target: Target, *, num_devices: int | None = None) -> SearchResult:
  """The ranking of a search, by arithmetic alone: on as many devices as there are, or are given.

  Raises:
    UserError: no data sheet, or nothing suits.
  """
  num_devices = num_devices or len(target.devices)
  if target.chip is None:
    raise UserError(
      f'a search needs the data sheet of {target.name}: name a slice with --topology=v5e:4x4, or '
      "a chip with --chip='TPU v5e'"
    )
  candidates = []
  with use(target.one_device(), run.sharding):
    for layout in layouts(run, num_devices):
      try:
        candidates.append(Candidate(layout, estimate(layout, num_devices, target.chip)))
      except UserError:  # A size that this mesh cannot have.
        continue
  if not candidates:
    raise UserError(
      f'no layout of {num_devices} devices suits {run.data.batch_size} rows and this model: '
      'choose a batch_size with more divisors'
    )
  limit = target.chip.hbm_bytes
  return SearchResult(limit, len(candidates), tuple(_rank(candidates, COMFORTABLE * limit)))


def smallest_slice(run: RunConfig, target: Target) -> tuple[Topology, Candidate] | None:
  """The smallest slice of the target's generation where the run fits by estimate, and how.

  None if it fits on none of those that can be had, or the target is no slice.
  """
  for topology in larger_slices(target.topology) if target.topology else ():
    try:
      result = rank_layouts(run, target, num_devices=topology.num_chips)
    except UserError:  # The batch has too few rows for so many.
      continue
    if result.fits:
      return topology, result.ranked[0]
  return None


def layouts(run: RunConfig, num_devices: int) -> Iterator[RunConfig]:
  """Every layout worth a look; some of them may not suit the model."""
  for stages, tensor in itertools.product(divisors(num_devices), repeat=2):
    if num_devices % (stages * tensor) or run.model.num_heads % tensor:
      continue
    data = num_devices // (stages * tensor)
    if stages > run.model.num_layers or run.data.batch_size % data:
      continue
    mesh = MeshConfig(data=data, pipeline=stages, tensor=tensor)
    rows = run.data.batch_size // data
    for part in (part for part in _ROWS if rows % part == 0):
      moved = dataclasses.replace(run, mesh=mesh)
      yield from _staged(moved, rows // part) if stages > 1 else _unstaged(moved, rows // part)


def describe_layout(run: RunConfig) -> str:
  """'data=4 x pipeline=2 x tensor=2, 1f1b of 8 microbatches, recompute layer, ...'."""
  if run.mesh.pipeline == 1:
    parts = f', {run.loop.accumulation_steps} parts' if run.loop.accumulation_steps > 1 else ''
    return f'{run.mesh}{parts}, remat {run.model.remat.value}'
  config = run.pipeline
  chunks = f' of {config.num_chunks} chunks' if config.num_chunks > 1 else ''
  return (
    f'{run.mesh}, {config.schedule.value}{chunks}, {config.num_microbatches} microbatches, '
    f'recompute {config.recompute.value}, scores by {config.vocab.value}'
  )


def gin_bindings(run: RunConfig) -> str:
  """A layout as a gin file."""
  lines = [f'MeshConfig.{axis} = {size}' for axis, size in run.mesh.sizes.items()]
  if run.mesh.pipeline == 1:
    lines.append(f'LoopConfig.accumulation_steps = {run.loop.accumulation_steps}')
    lines.append(f'ModelConfig.remat = {run.model.remat.value!r}')
  else:
    config = run.pipeline
    lines.append('LoopConfig.accumulation_steps = 1')
    lines.append(f'PipelineConfig.schedule = {config.schedule.value!r}')
    lines.append(f'PipelineConfig.num_microbatches = {config.num_microbatches}')
    lines.append(f'PipelineConfig.num_chunks = {config.num_chunks}')
    # Written even where it is None: a file read before may say something else.
    lines.append(f'PipelineConfig.layers_per_span = {config.layers_per_span!r}')
    lines.append(f'PipelineConfig.recompute = {config.recompute.value!r}')
    lines.append(f'PipelineConfig.vocab = {config.vocab.value!r}')
    lines.append(f'PipelineConfig.bubble_filling_ratio = {config.bubble_filling_ratio}')
  return '\n'.join(lines) + '\n'


def _unstaged(run: RunConfig, num_parts: int) -> Iterator[RunConfig]:
  for remat in Remat:
    yield dataclasses.replace(
      run,
      loop=dataclasses.replace(run.loop, accumulation_steps=num_parts),
      model=dataclasses.replace(run.model, remat=remat),
    )


def _staged(run: RunConfig, num_parts: int) -> Iterator[RunConfig]:
  orders = [(ScheduleKind.GPIPE, 1), (ScheduleKind.ONE_F_ONE_B, 1)]
  if num_parts % run.mesh.pipeline == 0:
    fits = [c for c in _CHUNKS if c * run.mesh.pipeline <= run.model.num_layers]
    orders += [(ScheduleKind.INTERLEAVED, chunks) for chunks in fits]
  for (schedule, chunks), recompute, vocab in itertools.product(orders, Recompute, VocabPlacement):
    pipeline = dataclasses.replace(
      run.pipeline,
      schedule=schedule,
      num_microbatches=num_parts,
      num_chunks=chunks,
      layers_per_span=None,
      recompute=recompute,
      vocab=vocab,
      bubble_filling_ratio=0.0,
    )
    yield dataclasses.replace(
      run, loop=dataclasses.replace(run.loop, accumulation_steps=1), pipeline=pipeline
    )


def _rank(candidates: list[Candidate], comfortable: float) -> list[Candidate]:
  fitting = [c for c in candidates if c.estimate.memory.total <= comfortable]
  if not fitting:
    return sorted(candidates, key=lambda c: c.estimate.memory.total)
  return sorted(fitting, key=lambda c: (_step(c), c.estimate.memory.total))


def _step(candidate: Candidate) -> float:
  assert candidate.estimate.time is not None
  return candidate.estimate.time.step
