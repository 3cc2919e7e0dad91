"""The training loop: data, step, metrics, evaluation, checkpoints, interruption."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from exitax.checkpoint import CheckpointManager, checkpoints_directory, load_model, read_model
from exitax.data import Data, GroupData, build_data, check_tokenizer, shards_of_blocks
from exitax.errors import UserError
from exitax.objectives import ExitScore, add_sums, exit_scores, make_score_fn
from exitax.parallel import (
  any_process,
  batch_blocks,
  check_same,
  do_together,
  fetch,
  from_main_process,
  make_mesh,
  shard_batch,
  use,
)
from exitax.training.assembly import assemble
from exitax.training.config import RunConfig
from exitax.training.display import Display, QuietDisplay
from exitax.training.health import DivergenceError, HealthBounds, largest_rms
from exitax.training.initial import initial_params
from exitax.training.interrupt import AgreedStop, StopSignal
from exitax.training.metrics import FileMetricsWriter, MetricsWriter
from exitax.training.model_dir import prepare_model_dir
from exitax.training.profiler import ProfilerWindow
from exitax.training.state import TrainState, init_state
from exitax.training.step import StepMetrics
from exitax.training.throughput import Throughput, total_peak_flops
from exitax.training.trained import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
  """What a run ended with.

  Attributes:
    step: optimizer steps taken in total.
    finished: False when a signal stopped it early; the same command then resumes.
    scores: held-out scores of every exit at the end; empty if interrupted.
    params: the final parameters.
  """

  step: int
  finished: bool
  scores: tuple[ExitScore, ...]
  params: Any


def train(
  config: RunConfig, model_dir: str | os.PathLike[str], *, display: Display | None = None
) -> TrainResult:
  """Trains until `train_steps`, resuming from the latest checkpoint of `model_dir` if it has one.

  Restore order: the latest checkpoint of `model_dir`; else the parameters of
  `initial_checkpoint`; else random parameters. Resuming is bitwise: the final parameters are those
  of a run that was never stopped.

  Args:
    config: the run.
    model_dir: where files go.
    display: how to show progress; nothing by default.

  Raises:
    UserError: a configuration, data or checkpoint that does not fit; divergence.
  """
  display = display or QuietDisplay()
  data = do_together(lambda: build_data(config.data), part='reading its data')
  check_same(
    data.digest,
    name='the data (texts, split and tokenizer)',
    fix='all hosts need the same files and the same release of Python',
  )
  _check_vocabulary(config, data)
  data.check_context(config.model.max_length)
  mesh = make_mesh(config.mesh)
  with use(mesh, config.sharding), StopSignal() as stop:
    trainer = _Trainer(config, Path(model_dir), data, mesh, display)
    return trainer.run(AgreedStop(stop, mesh))


class _Trainer:
  """One run, with everything it holds open."""

  def __init__(
    self, config: RunConfig, model_dir: Path, data: Data | GroupData, mesh: Any, display: Display
  ) -> None:
    self._config = config
    self._loop = config.loop
    self._model_dir = model_dir
    self._display = display
    self._mesh = mesh
    self._assembly = assembly = assemble(config, mesh)
    self._model, self._optimizer = assembly.model, assembly.optimizer
    self._data = data
    blocks = batch_blocks(mesh, config.sharding)
    shards = shards_of_blocks(blocks.own, blocks.total)
    self._loader = data.train_loader(shards)
    self._eval_loader = data.eval_loader(shards, max_rows=self._loop.eval_rows)
    self._step = jax.jit(assembly.step, donate_argnums=0)
    score = make_score_fn(self._model, chunk_length=config.objective.chunk_length)
    self._score = jax.jit(assembly.pipelined.score if assembly.pipelined else score)
    self._manager = CheckpointManager(checkpoints_directory(model_dir), config=config.checkpoint)
    self._largest_rms = jax.jit(largest_rms)
    self._bounds = HealthBounds(
      max_nll=self._loop.max_loss_ratio * math.log(config.model.vocab_size)
    )
    self._profiler = ProfilerWindow(
      model_dir, start=self._loop.profile_start, num_steps=self._loop.profile_steps
    )
    self._scores: tuple[ExitScore, ...] = ()
    self._scored_step = -1
    self._saved_step = -1

  def run(self, stop: AgreedStop) -> TrainResult:
    state, first_step = self._start()
    with self._manager, _metrics_writer(self._model_dir, first_step) as writer:
      self._display.begin(
        step=first_step,
        train_steps=self._loop.train_steps,
        depth_names=self._trained_depths,
      )
      try:
        state, step = self._steps(state, first_step, writer, stop)
      finally:
        self._profiler.close()
        self._display.end()
      finished = step >= self._loop.train_steps
      if finished and self._scored_step != step:
        # The run was over before: its file of metrics has these numbers already.
        self._evaluate(state, step, _NoMetrics())
      if self._saved_step != step:
        self._save(state, step)
    return TrainResult(step=step, finished=finished, scores=self._scores, params=state.params)

  @property
  def _trained_depths(self) -> tuple[str, ...]:
    """Names of the depths that a step runs to: not to the end, if only exits are trained."""
    names = self._model.config.depth_names
    return names[:-1] if self._config.trained is Trained.EXITS else names

  def _start(self) -> tuple[TrainState, int]:
    """State and step to go on from: see the restore order of `train`."""
    latest = self._latest_step()
    rules = self._config.sharding
    if latest is not None:
      # Before reading arrays, so that a changed configuration is named by its field.
      prepare_model_dir(self._model_dir, self._config.model, self._data.tokenizer)
      restored = self._manager.restore(self._assembly.abstract_state(), step=latest)
      self._loader.set_state(dict(restored.extras['data']))
      self._saved_step = latest
      self._display.message(f'resuming from step {latest} in {self._model_dir}')
      return restored.state, latest
    key = jax.random.key(self._loop.seed)
    state = init_state(self._model, self._optimizer, key, self._mesh, rules, self._config.trained)
    if self._loop.initial_checkpoint:
      path = self._loop.initial_checkpoint
      do_together(lambda: read_model(path), part=f'reading initial_checkpoint={path}')
      source = load_model(path, mesh=self._mesh, rules=rules)
      check_tokenizer(
        self._data.tokenizer,
        expected_digest=source.tokenizer.digest,
        where=path,
      )
      params = initial_params(self._model, state.params, source, self._loop.initial_exits)
      state = dataclasses.replace(state, params=params)
    prepare_model_dir(self._model_dir, self._config.model, self._data.tokenizer)
    return state, 0

  def _latest_step(self) -> int | None:
    """The newest checkpoint as process 0 sees it, in every process."""
    latest = from_main_process(-1 if (step := self._manager.latest_step()) is None else step)
    return None if latest < 0 else latest

  def _steps(
    self, state: TrainState, step: int, writer: MetricsWriter, stop: AgreedStop
  ) -> tuple[TrainState, int]:
    loop = self._loop
    throughput: Throughput | None = None
    pending: list[StepMetrics] = []
    timed = 0
    batch: Any = None
    while step < loop.train_steps and not stop.reached():
      batch = shard_batch(next(self._loader), self._mesh, self._config.sharding)
      self._profiler.before(step)
      if throughput is None:
        throughput = self._throughput()
        state, metrics = self._step(state, batch)
        jax.block_until_ready(metrics)
        throughput.restart()  # The first step was mostly compilation.
      else:
        state, metrics = self._step(state, batch)
        timed += 1
      step += 1
      pending.append(metrics)
      if self._profiler.after(step, metrics):
        self._display.message(f'profile written to {self._profiler.directory}')
      self._display.advance(step)
      last = step == loop.train_steps
      save = step % loop.checkpoint_period == 0 or last
      evaluate = (loop.eval_period and step % loop.eval_period == 0) or last
      if step % loop.log_period == 0 or save or evaluate:
        jax.block_until_ready(metrics)  # Steps are dispatched ahead: time what has been done.
        self._report(pending, step, throughput.lap(timed) if timed else {}, writer)
        pending, timed = [], 0
      if evaluate or save:
        self._check_parameters(state, step, batch)
      if evaluate:
        self._evaluate(state, step, writer)
      if save:
        self._save(state, step)
      if evaluate or save:
        throughput.restart()
    if pending:
      jax.block_until_ready(pending)
      self._report(pending, step, throughput.lap(timed) if throughput and timed else {}, writer)
      self._check_parameters(state, step, batch)
    return state, step

  def _report(
    self,
    pending: list[StepMetrics],
    step: int,
    speed: Mapping[str, float],
    writer: MetricsWriter,
  ) -> None:
    """Writes the mean of the steps since the last report; stops if one of them diverged."""
    fetched = fetch(pending)
    problems = enumerate(map(self._bounds.problem_in_step, fetched), step - len(fetched) + 1)
    self._stop_if(*next(((text, at) for at, text in problems if text), (None, step)))
    sums = add_sums(metrics.sums for metrics in fetched)
    scores = exit_scores(self._model, sums, bytes_per_token=self._data.stats.train.bytes_per_target)
    values = _score_metrics('train', scores[: len(self._trained_depths)])
    values['train/loss'] = float(np.mean([m.loss for m in fetched]))
    values['gradient_norm'] = float(fetched[-1].gradient_norm)
    values['learning_rate'] = float(fetched[-1].learning_rate)
    for name, weight in zip(self._model.config.depth_names, fetched[-1].exit_weights, strict=True):
      values[f'exit_weight/{name}'] = float(weight)
    values.update(speed)
    writer.write(step, values)
    self._display.update(step, values)

  def _check_parameters(self, state: TrainState, step: int, batch: Any) -> None:
    """Stops before parameters are saved that the step's own numbers, made before it, say nothing of."""
    sums, rms = fetch((self._score(state.params, batch), self._largest_rms(state.params)))
    self._stop_if(self._bounds.problem_in_parameters(sums, float(rms)), step)

  def _stop_if(self, problem: str | None, step: int) -> None:
    # The numbers are the same in every process, or should be: none may stop alone.
    if not any_process(problem is not None):
      return
    self._manager.wait()
    good = self._latest_step()
    where = (
      'no checkpoint was written yet' if good is None else f'last good checkpoint: step {good}'
    )
    raise DivergenceError(
      f'training diverged at step {step}: {problem}; {where} in '
      f'{self._manager.directory}: lower learning_rate, lengthen warmup_steps or lower clip_norm'
    )

  def _evaluate(self, state: TrainState, step: int, writer: MetricsWriter) -> None:
    batches = (shard_batch(batch, self._mesh, self._config.sharding) for batch in self._eval_loader)
    sums = add_sums(fetch(self._score(state.params, batch)) for batch in batches)
    self._scores = exit_scores(
      self._model, sums, bytes_per_token=self._data.stats.held_out.bytes_per_target
    )
    self._scored_step = step
    writer.write(step, _score_metrics('held_out', self._scores))
    losses = '  '.join(f'{s.name} {s.nll:.3f} ({s.bits_per_byte:.3f} bpb)' for s in self._scores)
    self._display.message(f'held-out at step {step}: {losses}')

  def _save(self, state: TrainState, step: int) -> None:
    extras = {'data': self._loader.get_state(), 'data_digest': self._data.digest}
    # Scores of another step would mislead the choice of the best checkpoints.
    scores = self._scores if self._scored_step == step else ()
    metrics = _score_metrics('held_out', scores)
    self._manager.save(step, state, extras=extras, metrics=metrics)
    self._saved_step = step

  def _throughput(self) -> Throughput:
    flops = self._assembly.model_flops()
    tokens = self._config.data.batch_size * self._config.data.length
    peak = total_peak_flops(self._model.config.precision)
    return Throughput(tokens_per_step=tokens, flops_per_step=flops, peak=peak)


def _score_metrics(prefix: str, scores: tuple[ExitScore, ...]) -> dict[str, float]:
  fields: dict[str, Callable[[ExitScore], float]] = {
    'nll': lambda s: s.nll,
    'bits_per_byte': lambda s: s.bits_per_byte,
    'accuracy': lambda s: s.accuracy,
  }
  return {
    f'{prefix}/{score.name}/{field}': read(score)
    for score in scores
    for field, read in fields.items()
  }


class _NoMetrics:
  """For processes other than the first."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    pass

  def close(self) -> None:
    pass

  def __enter__(self) -> _NoMetrics:
    return self

  def __exit__(self, *args: object) -> None:
    pass


def _metrics_writer(model_dir: Path, resumed_step: int) -> FileMetricsWriter | _NoMetrics:
  if jax.process_index():
    return _NoMetrics()
  return FileMetricsWriter(model_dir, resumed_step=resumed_step)


def _check_vocabulary(config: RunConfig, data: Data | GroupData) -> None:
  if data.tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(
      f'the tokenizer has {data.tokenizer.vocab_size} ids, vocab_size={config.model.vocab_size} '
      'has no room for them: raise ModelConfig.vocab_size'
    )
