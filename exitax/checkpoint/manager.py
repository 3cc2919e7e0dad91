"""Saving and restoring training states: asynchronous, verified, with retention.

A save ends with the manifest; a restore begins with its verification. Older steps are removed only
after a newer one is committed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from exitax.checkpoint import commit, lazy, manifest, processes, reading, retention, tree
from exitax.checkpoint.artifacts import write_bytes_atomic
from exitax.checkpoint.config import CheckpointConfig
from exitax.checkpoint.errors import CheckpointError
from exitax.checkpoint.folders import StepFolders, WriterLock
from exitax.checkpoint.reading import CheckpointInfo, Restored
from exitax.checkpoint.store import save_arrays
from exitax.checkpoint.streaming import stream_arrays

_logger = logging.getLogger('exitax.checkpoint')
_DEFAULT_CONFIG = CheckpointConfig()
# How long a process that fails waits for a save that may wait for a process that is gone.
_PATIENCE_SECONDS = 10.0


class CheckpointManager:
  """The checkpoints of one directory, `<directory>/<step>/`, one save at a time.

  In a run of several processes all of them call `save`, `wait`, `close` and the restoring methods,
  in the same order, and share the file system of `directory`. Use it as a context manager, or call
  `close`: a save still under way when the interpreter ends is lost.

  Args:
    directory: the checkpoints folder; created by the first save.
    config: what to keep.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    config: CheckpointConfig = _DEFAULT_CONFIG,
  ) -> None:
    self._folders = StepFolders(Path(directory).absolute())
    self._config = config
    self._thread: threading.Thread | None = None
    self._failure: BaseException | None = None

  @property
  def directory(self) -> Path:
    """The absolute path of the checkpoints folder."""
    return self._folders.root

  # Saving

  def save(
    self,
    step: int,
    state: Any,
    *,
    extras: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts saving a state and returns; the state's buffers may be donated at once.

    Waits for the save before, if that is still under way. A finished checkpoint of the same step is
    replaced, and kept until the new one is committed.

    Args:
      step: the training step, 0 or more.
      state: pytree of arrays (typed PRNG keys included) and numbers, with named children.
      extras: JSON-able data; every process's own are kept (the state of its data iterator, say).
        They come back as JSON gives them: tuples as lists, keys as strings.
      metrics: numbers by name, for best-N retention and for reading later.

    Raises:
      CheckpointError: the save before failed, or this one could not begin.
      TypeError: the extras are not JSON-able.
      ValueError: the state holds something that is not an array or number.
    """
    encoded_extras = json.dumps(dict(extras or {}), sort_keys=True).encode()
    # First, so that never two copies of the state wait in host memory.
    self.wait()
    self._start(step, tree.as_saveable(tree.named_leaves(state)), encoded_extras, metrics)

  def save_streamed(
    self, step: int, state: Any, *, extras: Mapping[str, Any] | None = None
  ) -> None:
    """Saves a state block by block, without a copy of it, and waits.

    For states that fill the memory, or that are larger than it. Leaves are `LazyArray`s or arrays
    that do not change meanwhile; other arguments and errors are those of `save`, and what a leaf's
    `read` raises is one of the reasons that a save can fail for.
    """
    encoded_extras = json.dumps(dict(extras or {}), sort_keys=True).encode()
    self.wait()
    leaves = {path: lazy.as_lazy(leaf) for path, leaf in tree.named_leaves(state).items()}
    self._start(step, leaves, encoded_extras, None, stream_arrays)
    self.wait()

  def _start(
    self,
    step: int,
    saveable: Mapping[str, Any],
    encoded_extras: bytes,
    metrics: Mapping[str, float] | None,
    write_fn: Callable[..., Callable[[], None] | None] = save_arrays,
  ) -> None:
    plan = commit.CommitPlan(
      folder=self._folders.path(step),
      step=step,
      num_processes=jax.process_count(),
      metrics={name: float(value) for name, value in (metrics or {}).items()},
      leaves=tree.leaf_specs(saveable),
    )
    lock = self._begin(step)
    try:
      self._write_extras(plan.folder, encoded=encoded_extras)
      finish_arrays = write_fn(plan.folder / commit.ARRAYS_FOLDER, leaves=saveable)
    except BaseException as error:
      if lock:
        lock.abandon()
      raise self._save_error(step, error=error) from error
    self._thread = threading.Thread(
      target=self._finish, args=(plan, lock, finish_arrays), name=f'checkpoint-{step}'
    )
    self._thread.start()

  def wait(self) -> None:
    """Blocks until the save under way, if any, is committed.

    Raises:
      CheckpointError: that save failed; older checkpoints are untouched.
    """
    if self._thread is not None:
      failure = self._join()
      processes.raise_together(failure)

  def close(self) -> None:
    """Waits for the save under way. Raises as `wait` does."""
    self.wait()

  def __enter__(self) -> CheckpointManager:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if error is None:
      self.close()
      return
    # Another exception is on its way, and other processes may not come to a barrier any more.
    if self._thread is not None and jax.process_count() > 1:
      self._thread.join(_PATIENCE_SECONDS)
      if self._thread.is_alive():
        _logger.error('the save under way was given up: it waits for another process')
        return
    if failure := self._join():
      _logger.error('%s', failure)

  # Looking

  def steps(self) -> list[int]:
    """Finished steps in ascending order; unfinished ones are left out, with a notice in the log."""
    self._folders.notice_unfinished()
    return list(self._folders.finished())

  def latest_step(self) -> int | None:
    """The newest finished step, or None."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The finished step with the best `config.best_metric`, or None if no step has it."""
    ranked = retention.rank_by_metric(self._metrics_by_step(), config=self._config)
    return ranked[0] if ranked else None

  def info(self, step: int | None = None) -> CheckpointInfo:
    """What a step holds (extras, metrics, shapes), verified, without reading its arrays.

    This, `verify` and the restoring methods wait for a save under way.

    Raises:
      CheckpointError: no such step, or its small files are damaged.
    """
    return reading.read_info(self._folders, step=self._choose(step))

  def verify(self, step: int | None = None) -> None:
    """Hashes every file of a step.

    Raises:
      CheckpointError: no such step, or a file is damaged: names file, step and an intact step.
    """
    reading.verify(self._folders, step=self._choose(step), paths=None)

  # Restoring

  def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored:
    """Reads a whole state, verified, into the shardings of `abstract_state`.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, of any mesh.
      step: the step to read; the latest by default.

    Raises:
      CheckpointError: no such step; a damaged file; another tree, shape or dtype.
    """
    return reading.restore(
      self._folders, step=self._choose(step), abstract=abstract_state, prefix=''
    )

  def restore_subtree(
    self,
    abstract_subtree: Any,
    *,
    prefix: str,
    step: int | None = None,
    partial: bool = False,
  ) -> Restored:
    """Reads the part of a state below `prefix` ('params', 'params/blocks'), and no other part.

    Only the files of the top-level child are hashed and read. Raises as `restore` does.

    Args:
      abstract_subtree: pytree of `jax.ShapeDtypeStruct` with shardings, as it lies below `prefix`.
      prefix: path of names joined by '/'.
      step: the step to read; the latest by default.
      partial: leaves that the checkpoint has there beyond `abstract_subtree` are left out, where
        they are an error otherwise.
    """
    return reading.restore(
      self._folders,
      step=self._choose(step),
      abstract=abstract_subtree,
      prefix=prefix + '/',
      partial=partial,
    )

  def restore_params(
    self, abstract_params: Any, *, step: int | None = None, partial: bool = False
  ) -> Restored:
    """Reads the state's child 'params' and leaves the optimizer alone: see `restore_subtree`."""
    return self.restore_subtree(abstract_params, prefix='params', step=step, partial=partial)

  # Inside

  def _begin(self, step: int) -> WriterLock | None:
    lock, failure = None, None
    if processes.is_main_process():
      try:
        lock = self._folders.begin(step)
      except (CheckpointError, OSError) as error:
        failure = self._save_error(step, error=error)
    processes.raise_together(failure)
    return lock

  def _write_extras(self, folder: Path, *, encoded: bytes) -> None:
    failure = None
    try:
      write_bytes_atomic(folder / commit.extras_name(jax.process_index()), encoded)
    except OSError as error:
      failure = error
    processes.raise_together(failure)

  def _finish(
    self, plan: commit.CommitPlan, lock: WriterLock | None, finish_arrays: Callable[[], None] | None
  ) -> None:
    try:
      if finish_arrays:
        finish_arrays()
      if lock:
        commit.write_manifest(plan)
    except BaseException as error:
      if lock:
        lock.abandon()
      self._failure = self._save_error(plan.step, error=error)
      self._failure.__cause__ = error
      return
    if lock:
      lock.finish()
      self._tidy(plan.step)

  def _tidy(self, committed_step: int) -> None:
    # The new step is safe already: what goes wrong here must not look like a failed save.
    try:
      self._folders.clean()
      keep = retention.steps_to_keep(self._metrics_by_step(), config=self._config)
      for step in self._folders.finished():
        if step not in keep and step != committed_step:
          self._folders.remove(step)
    except OSError as error:
      _logger.warning('could not remove old checkpoints in %s: %s', self.directory, error)

  def _join(self) -> BaseException | None:
    if self._thread is not None:
      self._thread.join()
    failure, self._thread, self._failure = self._failure, None, None
    return failure

  def _save_error(self, step: int, *, error: BaseException) -> BaseException:
    if isinstance(error, CheckpointError) or not isinstance(error, Exception):
      return error
    latest = max(self._folders.finished(), default=None)
    intact = 'no earlier checkpoint exists' if latest is None else f'step {latest} is untouched'
    return CheckpointError(
      f'step {step} could not be saved in {self.directory} ({error}): {intact}; '
      'check free space and permissions, then run the same command to resume'
    )

  def _metrics_by_step(self) -> dict[int, Mapping[str, float]]:
    metrics: dict[int, Mapping[str, float]] = {}
    for step, folder in self._folders.finished().items():
      try:
        metrics[step] = manifest.read(folder).metrics
      except (manifest.DamagedManifest, CheckpointError) as error:
        _logger.warning('the manifest of checkpoint %s %s', folder, error)
        metrics[step] = {}
    return metrics

  def _choose(self, step: int | None) -> int:
    self.wait()
    finished = self.steps()
    chosen = max(finished, default=-1) if step is None else step
    chosen = processes.from_main_process(chosen)
    if chosen in finished:
      return chosen
    if not finished:
      raise CheckpointError(
        f'{self.directory} holds no finished checkpoint: '
        'name a model directory that training has saved to, or train first'
      )
    known = ', '.join(map(str, finished))
    raise CheckpointError(
      f'step {chosen} is not among the finished checkpoints of {self.directory}: choose {known}'
    )
