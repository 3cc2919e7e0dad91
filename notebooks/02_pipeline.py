# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pipelines and early exits
#
# In about a minute on two cores and without an accelerator: who works when in a pipeline, what of it is idle, what it keeps in memory, where
# exits go and what they cost there, and a plan of a 1.3B early-exit model for a TPU slice that is not here.
#
# The devices are emulated: XLA sees sixteen CPU devices and makes the program that sixteen accelerators would run. This must come before the first array is made.

# %%
from exitax.parallel import emulate_devices

emulate_devices(16)

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from rich.console import Console

from exitax.data import Batch, DataConfig
from exitax.errors import UserError
from exitax.models import ExitConfig, ExitLM, ModelConfig, plan_stages
from exitax.objectives import ExitWeight, ObjectiveConfig, VocabPlacement, exit_objective
from exitax.parallel import (
  MeshConfig,
  ShardingRules,
  bubble_formula,
  count_flops,
  format_bytes,
  make_mesh,
  make_schedule,
  render_schedule,
  shard_batch,
  tree_shardings,
  use,
)
from exitax.planning import (
  COMFORTABLE,
  Candidate,
  describe_layout,
  draw_schedules,
  estimate,
  find_target,
  gin_bindings,
  layouts,
  make_plan,
  render_plan,
  span_cost,
  to_png,
)
from exitax.training import (
  LoopConfig,
  PipelineConfig,
  PipelinedObjective,
  Recompute,
  RunConfig,
  assemble,
)

# Okabe and Ito's colours, which most colour-blind people tell apart.
BLUE, GREEN, ORANGE, GREY = '#0072B2', '#009E73', '#D55E00', '#8c8c8c'
plt.rcParams.update(
  {
    'figure.dpi': 110,
    'figure.constrained_layout.use': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'legend.frameon': False,
  }
)

# %% [markdown]
# ## Schedules are tables
#
# A model's layers are cut into spans, one or more for every *stage*; a batch is cut into *microbatches* that follow each other through the stages.
# A schedule says what each stage does at each tick: a forward (blue), a backward (green), both, or nothing. It is a table of numbers that the tests check, one executor
# runs, and one function draws. The number in a box is the microbatch; lighter boxes are a stage's second span.

# %%
schedules = [
  make_schedule('gpipe', num_stages=4, num_microbatches=8),
  make_schedule('1f1b', num_stages=4, num_microbatches=8),
  make_schedule('interleaved', num_stages=4, num_microbatches=8, num_chunks=2),
]
Image(to_png(draw_schedules(schedules)), width=1000)

# %% [markdown]
# The same as text, for two stages and four microbatches: `f2b0` is a tick with the forward of microbatch 2 and the backward of microbatch 0, `f0'` a forward of the second span.

# %%
for kind, num_chunks in (('gpipe', 1), ('1f1b', 1), ('interleaved', 2)):
  schedule = make_schedule(kind, num_stages=2, num_microbatches=4, num_chunks=num_chunks)
  print(f'{kind}\n{render_schedule(schedule)}\n')

# %% [markdown]
# ## Bubbles
#
# With $P$ stages, $M$ microbatches and $v$ spans per stage, a stage is idle for
#
# $$\frac{P - 1}{v M + P - 1}$$
#
# of the time, whatever a backward costs beside a forward. Lines are the formula, dots are counted in the tables: they agree, so the formula is what the executor runs.
# Interleaving takes multiples of $P$ microbatches.

# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
for num_stages, axes in zip((2, 4, 8), panels, strict=True):
  counts = [num_stages * n for n in (1, 2, 4, 8, 16) if num_stages * n <= 64]
  for num_chunks, colour in zip((1, 2, 4), (BLUE, GREEN, ORANGE), strict=True):
    kind = 'interleaved' if num_chunks > 1 else '1f1b'
    counted = [
      make_schedule(
        kind, num_stages=num_stages, num_microbatches=count, num_chunks=num_chunks
      ).bubble_fraction()
      for count in counts
    ]
    formula = [bubble_formula(num_stages, count, num_chunks) for count in counts]
    np.testing.assert_allclose(counted, formula, rtol=1e-12)
    smooth = np.geomspace(counts[0], counts[-1], 50)
    axes.plot(smooth, (num_stages - 1) / (num_chunks * smooth + num_stages - 1), color=colour)
    axes.plot(counts, counted, 'o', color=colour, label=f'{num_chunks} per stage')
  axes.set(xscale='log', title=f'{num_stages} stages', xlabel='microbatches', ylim=(0, 0.55))
  axes.set_xticks(counts, map(str, counts))
  axes.minorticks_off()
  axes.yaxis.set_major_formatter(lambda share, _: f'{share:.0%}')
panels[0].set_ylabel('idle share of the step')
panels[-1].legend(title='spans of layers')
plt.show()

# %% [markdown]
# ## Memory
#
# More microbatches make a smaller bubble. What do they cost in memory? With GPipe every microbatch is in flight at once; with 1F1B a stage starts backwards as soon as it
# can, so that no more than $2P - 1$ are, however many there are in all.
#
# Measured, not drawn from a formula: a training step of a small model is compiled for four stages, and the compiler says what a device allocates
# beside its arguments and results. A microbatch is one row; nothing is recomputed, so all that a backward reads is kept.

# %%
SMALL = ModelConfig(
  vocab_size=256,
  num_layers=8,
  embed_dim=64,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=176,
  max_length=64,
  exits=(ExitConfig(layer=2), ExitConfig(layer=4)),
)
# Compiling takes most of the time here. Memory is laid out before the code that this level is about.
FAST_COMPILE = {'xla_backend_optimization_level': 0}


def make_run(model: ModelConfig, mesh: MeshConfig, pipeline: PipelineConfig, rows: int):
  return RunConfig(
    model=model,
    data=DataConfig(batch_size=rows, length=model.max_length),
    loop=LoopConfig(train_steps=1),
    objective=ObjectiveConfig(exit_weights=(ExitWeight(start=0.25),) * len(model.exits)),
    mesh=mesh,
    pipeline=pipeline,
  )


def temporary_bytes(kind: str, num_microbatches: int) -> int:
  mesh = MeshConfig(data=1, pipeline=4)
  pipeline = PipelineConfig(
    schedule=kind, num_microbatches=num_microbatches, recompute=Recompute.NONE
  )
  run = make_run(SMALL, mesh, pipeline, rows=num_microbatches)
  assembly = assemble(run, make_mesh(mesh, jax.devices()[:4]))
  with use(assembly.mesh, run.sharding):
    step = jax.jit(assembly.step, donate_argnums=0)
    lowered = step.lower(assembly.abstract_state(), assembly.abstract_batch())
    return lowered.compile(FAST_COMPILE).memory_analysis().temp_size_in_bytes


counts = (4, 8, 16)
measured = {kind: [temporary_bytes(kind, count) for count in counts] for kind in ('gpipe', '1f1b')}

# %%
figure, axes = plt.subplots(figsize=(7, 3.8))
for kind, name, colour, offset in (
  ('gpipe', 'GPipe', ORANGE, (-6, 6)),
  ('1f1b', '1F1B', BLUE, (-6, -16)),
):
  megabytes = [value / 1e6 for value in measured[kind]]
  axes.plot(counts, megabytes, 'o-', color=colour)
  axes.annotate(
    name,
    (counts[-1], megabytes[-1]),
    xytext=(8, -4),
    textcoords='offset points',
    color=colour,
    annotation_clip=False,
  )
  for count, value in zip(counts, megabytes, strict=True):
    slots = make_schedule(kind, num_stages=4, num_microbatches=count).num_slots
    axes.annotate(
      f'{slots} in flight',
      (count, value),
      xytext=offset,
      textcoords='offset points',
      ha='right' if kind == 'gpipe' else 'center',
      fontsize=8,
      color=colour,
    )
axes.set(xlabel='microbatches', ylabel='MB per device', title='Temporary memory of a training step')
axes.set(xlim=(2, 17), ylim=(0, 1.1 * max(measured['gpipe']) / 1e6), xticks=counts)
axes.yaxis.get_major_locator().set_params(integer=True)
plt.show()
# Once 2 P - 1 are in flight, 1F1B takes what it takes.
assert max(measured['1f1b'][1:]) < 1.05 * min(measured['1f1b'][1:])
assert measured['gpipe'][-1] > 1.5 * measured['gpipe'][1]

# %% [markdown]
# ## Where exits go
#
# An exit after layer $l$ belongs to the span that goes on past layer $l$: one at a cut is the first thing of the next stage, so nobody waits for it. Here are a model of 24 layers
# on four stages and three places for one exit; the last has *two* heads on one stage, as the final head is there already.

# %%
LARGE = ModelConfig(
  vocab_size=32000,
  num_layers=24,
  embed_dim=2048,
  num_heads=32,
  mlp_dim=5440,
  max_length=2048,
)
PLACES = {
  'no exit': (),
  'in the middle of a stage': (9,),
  'at a boundary': (12,),
  'on the last stage': (21,),
}


def with_exits(model: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
  return dataclasses.replace(model, exits=tuple(ExitConfig(layer=layer) for layer in layers))


print(' ' * 26 + ''.join(f'stage {stage:<10}' for stage in range(4)))
for place, layers in PLACES.items():
  plan = plan_stages(with_exits(LARGE, layers), num_stages=4)
  cells = []
  for indices in plan.exits:
    depths = [plan.depths[index] for index in indices]
    cells.append(', '.join('final' if n == LARGE.num_layers else f'exit {n}' for n in depths))
  print(f'{place:26}' + ''.join(f'{cell or ".":16}' for cell in cells))

# %% [markdown]
# ### What a tick costs
#
# Stages work in lock step: a tick (one forward and one backward of a microbatch) lasts as long as its dearest stage. A head of this model costs a fifth more than a layer, so it matters
# where scores are computed. exitax offers two ways:
#
# - `vocab='stage'`: on the stage where the exit is. One more exit on *another* stage is free, two on one stage are not.
# - `vocab='pipeline'`: every stage computes a part of the vocabulary of every exit, so stages are never unbalanced, wherever exits are.
#
# Bars are what each stage has to do; the line is how long a tick lasts, from the estimate that `exitax plan` uses. For the exit on the last stage it is checked against the flops of the traced program.

# %%
NUM_MICROBATCHES, TICKS = 8, 8 + 4 - 1


def layout(layers: tuple[int, ...], vocab: VocabPlacement) -> RunConfig:
  pipeline = PipelineConfig(
    num_microbatches=NUM_MICROBATCHES, recompute=Recompute.NONE, vocab=vocab
  )
  return make_run(
    with_exits(LARGE, layers), MeshConfig(1, pipeline=4), pipeline, rows=NUM_MICROBATCHES
  )


def stage_work(run: RunConfig) -> tuple[np.ndarray, np.ndarray]:
  """Flops of a tick by stage: of layers, and of scores."""
  model, length = run.model, run.data.length
  plan = plan_stages(model, num_stages=4)
  cost = span_cost(model, num_layers=6, num_taps=1, length=length, recompute=Recompute.NONE)
  of_layers = np.full(4, cost.forward_flops + cost.backward_flops)
  # A product with the matrix and the gradients of both.
  one_exit = 3 * 2 * length * model.embed_dim * model.vocab_size
  if run.pipeline.vocab is VocabPlacement.PIPELINE:
    return of_layers, np.full(4, one_exit * len(plan.depths) / 4)
  return of_layers, np.array([one_exit * len(exits) for exits in plan.exits])


def counted_tick(run: RunConfig) -> float:
  """Flops of one device in one tick, counted in the traced training step."""
  assembly = assemble(run, make_mesh(run.mesh, jax.devices()[:4]))
  with use(assembly.mesh, run.sharding):
    found = count_flops(assembly.step, assembly.abstract_state(), assembly.abstract_batch())
  return found.flops / 4 / TICKS


one_device = make_mesh(MeshConfig(data=1), jax.devices()[:1])
figure, panels = plt.subplots(2, 4, figsize=(11, 5.4), sharex=True, sharey=True)
for row, vocab in zip(panels, VocabPlacement, strict=True):
  for axes, (place, layers) in zip(row, PLACES.items(), strict=True):
    run = layout(layers, vocab)
    with use(one_device, ShardingRules()):
      of_layers, of_scores = stage_work(run)
      tick = estimate(run, 4, None).executed_flops / TICKS
    np.testing.assert_allclose(tick, (of_layers + of_scores).max(), rtol=1e-6)
    if place == 'on the last stage':
      np.testing.assert_allclose(counted_tick(run), tick, rtol=0.01)
    axes.bar(range(4), of_layers / 1e12, color=BLUE, label='layers')
    axes.bar(range(4), of_scores / 1e12, bottom=of_layers / 1e12, color=GREEN, label='scores')
    axes.axhline(tick / 1e12, color=ORANGE, label='the tick lasts')
    axes.text(-0.4, tick / 1e12 + 0.1, f'{tick / 1e12:.2f}', color=ORANGE, fontsize=9)
    axes.set_xticks(range(4))
    if axes in panels[0]:
      axes.set_title(place, fontsize=11)
  row[0].set_ylabel(f'scores by {vocab.value}\nTflop of a tick')
for axes in panels[1]:
  axes.set_xlabel('stage')
panels[0, 0].set_ylim(0, 6.5)
handles, labels = panels[0, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc='outside lower center', ncols=3)
plt.show()

# %% [markdown]
# By stage, an exit in the middle or at a boundary changes nothing: the last stage, which has the final head, was the dearest anyway. On the last stage the exit makes every tick longer. By pipeline
# an exit anywhere costs a quarter of its scores, the least that is possible, and even the model without exits gains; the price is that the exits' features travel to all stages.

# %% [markdown]
# ### The same gradients
#
# None of this changes what is learnt. The small model with three exits (in the middle of a stage, at a boundary, on the last stage) on four stages: its loss and all its gradients, against those of one device by
# plain automatic differentiation of the whole model.


# %%
def make_batch(rows: int, model: ModelConfig) -> Batch:
  """Random rows of two packed documents."""
  rng = np.random.default_rng(0)
  length = model.max_length
  half = np.arange(length) // (length // 2)
  segment_ids = np.tile(half + 1, (rows, 1)).astype(np.int32)
  positions = np.tile(np.arange(length) % (length // 2), (rows, 1)).astype(np.int32)
  tokens, targets = rng.integers(0, model.vocab_size, (2, rows, length)).astype(np.int32)
  return Batch(tokens, targets, segment_ids, positions, weights=np.ones((rows, length), np.float32))


def on_one_device(model: ExitLM, params, batch: Batch, objective: ObjectiveConfig):
  def loss(params):
    return exit_objective(model, params, batch, objective.weights_at(0), config=objective)

  step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)
  (value, _), grads = jax.device_get(step(params))
  return value, grads


def on_four_stages(
  model: ExitLM, params, batch: Batch, objective: ObjectiveConfig, vocab: VocabPlacement
):
  mesh, rules = make_mesh(MeshConfig(data=1, pipeline=4), jax.devices()[:4]), ShardingRules()
  pipeline = PipelineConfig(num_microbatches=8, vocab=vocab)
  with use(mesh, rules):
    pipelined = PipelinedObjective(model, mesh, rules, objective=objective, pipeline=pipeline)
    params = jax.device_put(params, tree_shardings(params, model.logical_axes(), mesh, rules))
    step = jax.jit(pipelined.value_and_grad, compiler_options=FAST_COMPILE)
    result = step(params, shard_batch(batch, mesh, rules), objective.weights_at(0))
    (value, _), grads = jax.device_get(result)
  return value, grads


model = ExitLM(with_exits(dataclasses.replace(SMALL, max_length=16), (3, 4, 7)))
print('exits of each stage:', plan_stages(model.config, num_stages=4).exits)
objective = ObjectiveConfig(
  exit_weights=(ExitWeight(start=0.25), ExitWeight(start=0.5), ExitWeight(start=0.75))
)
params = jax.device_get(model.init(jax.random.key(0)))
batch = make_batch(8, model.config)
wanted_loss, wanted = on_one_device(model, params, batch, objective)
print(f'one device: summed loss {wanted_loss:.4f}')
for vocab in VocabPlacement:
  loss, grads = on_four_stages(model, params, batch, objective, vocab)
  errors = [
    float(np.abs(left - right).max() / np.abs(right).max())
    for left, right in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True)
  ]
  print(
    f'four stages, scores by {vocab.value}: summed loss {loss:.4f}, {len(errors)} gradients, '
    f'the worst off by {max(errors):.0e} of its largest entry'
  )
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
  assert max(errors) < 1e-5

# %% [markdown]
# ## A plan for a slice that is not here
#
# EE-LLM's 1.3B model (arXiv 2312.04916): exits after layers 6 and 12 that read the tied matrix, 2048 rows of 2048 tokens a step; and a TPU v5e slice of 4 x 4 chips. By arithmetic alone, without
# compiling anything, one layout takes a moment. `exitax plan --topology=v5e:4x4` asks the TPU compiler as well, where libtpu is installed.

# %%
run = RunConfig(
  model=dataclasses.replace(with_exits(LARGE, (6, 12)), precision='bfloat16'),
  data=DataConfig(batch_size=2048, length=2048),
  loop=LoopConfig(train_steps=100_000),
  objective=ObjectiveConfig(exit_weights=(ExitWeight(start=0.25), ExitWeight(start=0.5))),
  mesh=MeshConfig(data=4, pipeline=4, tensor=1),
  pipeline=PipelineConfig(num_microbatches=128, recompute=Recompute.LAYER),
)
target = find_target('v5e:4x4')
by_hand = make_plan(run, target, compile=False)
Console(width=125).print(render_plan(by_hand))

# %% [markdown]
# Times are bounds from below: no chip reaches its peak rates. They are good for comparing layouts, so compare all of them: every mesh of sixteen chips, schedule, number of
# microbatches, way of recomputation and place of the scores. `exitax plan --search` does this and compiles the best few.


# %%
def estimated(run: RunConfig) -> Candidate | None:
  try:
    return Candidate(run, estimate(run, len(target.devices), target.chip))
  except UserError:  # A size that this mesh cannot have.
    return None


with use(target.one_device(), run.sharding):
  candidates = [item for item in map(estimated, layouts(run, len(target.devices))) if item]
limit = target.chip.hbm_bytes
comfortable = [c for c in candidates if c.estimate.memory.total <= COMFORTABLE * limit]
best = min(comfortable, key=lambda c: c.estimate.time.step)
print(f'{len(candidates):,} layouts, of which {len(comfortable):,} take at most {COMFORTABLE:.0%}')
print(f'best: {describe_layout(best.run)}')
print(
  f'{best.estimate.time.step:.1f} s a step, MFU at most {best.estimate.mfu:.0%}, '
  f'{format_bytes(best.estimate.memory.total)} of {format_bytes(limit)}'
)

# %%
figure, axes = plt.subplots(figsize=(9.5, 5))
axes.axvspan(limit / 2**30, 2000, color='#eeeeee', label='does not fit')
axes.axvline(COMFORTABLE * limit / 2**30, color=GREY, ls='--', label='comfortable')
for stages, colour in zip((1, 2, 4, 8, 16), ('black', BLUE, GREEN, ORANGE, '#CC79A7'), strict=True):
  found = [c.estimate for c in candidates if c.run.mesh.pipeline == stages]
  axes.scatter(
    [e.memory.total / 2**30 for e in found],
    [e.time.step for e in found],
    s=9,
    alpha=0.6,
    color=colour,
    label=f'{stages} stage{"s" * (stages > 1)}',
  )
for candidate, marker, name in ((by_hand, 's', 'by hand'), (best, '*', 'best')):
  axes.plot(
    candidate.estimate.memory.total / 2**30,
    candidate.estimate.time.step,
    marker,
    color='#F0E442',
    markeredgecolor='black',
    markersize=18 if marker == '*' else 9,
    label=name,
  )
axes.set(xscale='log', yscale='log', xlim=(1.4, 1200), ylim=(15, 80))
axes.set(xlabel='GiB per chip', ylabel='seconds per step, at least')
for ticks, axis in (
  ((2, 4, 8, 16, 64, 256, 1024), axes.xaxis),
  ((15, 20, 30, 40, 60, 80), axes.yaxis),
):
  axis.set_ticks(ticks, map(str, ticks))
axes.minorticks_off()
axes.set_title('Every layout of the 1.3B model on a v5e 4x4 slice', loc='left')
axes.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
# The best layout as a gin file, ready for `exitax train` or `exitax plan`:

# %%
print(gin_bindings(best.run))
