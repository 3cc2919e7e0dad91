"""Reading a finished step: verify, compare with the configuration, load."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from exitax.checkpoint import commit, manifest, processes, store, tree
from exitax.checkpoint.errors import CheckpointError
from exitax.checkpoint.folders import LOCK_NAME, StepFolders
from exitax.checkpoint.manifest import DamagedManifest, Manifest
from exitax.checkpoint.tree import LeafSpec

_ARRAYS_PREFIX = commit.ARRAYS_FOLDER + '/'

_logger = logging.getLogger('exitax.checkpoint')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
  """What a finished step holds, without its arrays.

  Attributes:
    step: the training step.
    metrics: as saved.
    extras: this process's extras; process 0's if another number of processes saved them.
    process_extras: the extras of every process that saved.
    leaves: shape and dtype of every leaf of the state, by path.
  """

  step: int
  metrics: Mapping[str, float]
  extras: Mapping[str, Any]
  process_extras: tuple[Mapping[str, Any], ...]
  leaves: Mapping[str, LeafSpec]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
  """A restored state with the information of its step.

  Attributes:
    state: pytree like the abstract one, of arrays in its shardings.
    info: the step's extras, metrics and specs.
  """

  state: Any
  info: CheckpointInfo

  @property
  def step(self) -> int:
    """The training step."""
    return self.info.step

  @property
  def extras(self) -> Mapping[str, Any]:
    """This process's extras."""
    return self.info.extras


def restore(
  folders: StepFolders, *, step: int, abstract: Any, prefix: str, partial: bool = False
) -> Restored:
  """Loads the leaves below `prefix` ('' or a path that ends with '/') like `abstract`.

  With `partial` a checkpoint may have more leaves there.

  Raises:
    CheckpointError: damage, or another tree, shape or dtype than `abstract`.
  """
  wanted = {prefix + path: leaf for path, leaf in tree.named_leaves(abstract).items()}
  content = verify(folders, step=step, paths=wanted)
  folder = folders.finished()[step]
  _compare(folder, content=content, wanted=wanted, prefix=prefix, partial=partial)
  loaded = store.load_arrays(folder / commit.ARRAYS_FOLDER, abstract_leaves=wanted)
  state = jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in wanted])
  return Restored(state=state, info=_info(folder, content=content))


def read_info(folders: StepFolders, *, step: int) -> CheckpointInfo:
  """Reads the small files of a step after verifying them.

  Raises:
    CheckpointError: one of them is damaged.
  """
  content = verify(folders, step=step, paths=())
  return _info(folders.finished()[step], content=content)


def verify(folders: StepFolders, *, step: int, paths: Iterable[str] | None) -> Manifest:
  """Hashes the files that hold leaves at `paths` (None: all leaves) and the step's small files.

  The processes of a run share the work and fail together.

  Raises:
    CheckpointError: names the damaged file, the step, and the newest intact step before it.
  """
  folder = folders.finished()[step]
  is_needed = _file_filter(paths)
  try:
    content = manifest.read(folder)
    share = slice(jax.process_index(), None, jax.process_count())
    damage = manifest.find_damage(folder, manifest=content, is_needed=is_needed, share=share)
    if content.step != step:
      damage = f'{manifest.MANIFEST_NAME} belongs to step {content.step}'
  except DamagedManifest as error:
    content, damage = None, f'{manifest.MANIFEST_NAME} {error}'
  failure = _damage_error(folders, step=step, damage=damage) if damage else None
  processes.raise_together(failure)
  assert content is not None
  for name in manifest.unlisted_files(folder, manifest=content):
    if name != LOCK_NAME:
      _logger.warning('%s is not part of checkpoint %s and is not read', name, folder)
  return content


def _file_filter(paths: Iterable[str] | None) -> Callable[[str], bool]:
  if paths is None:
    return lambda name: True
  groups = list(paths)
  return lambda name: (
    not name.startswith(_ARRAYS_PREFIX)
    or store.is_needed_for(name.removeprefix(_ARRAYS_PREFIX), paths=groups)
  )


def _damage_error(folders: StepFolders, *, step: int, damage: str) -> CheckpointError:
  folder = folders.finished()[step]
  intact = _newest_intact(folders, before=step)
  if intact is None:
    fix = 'no older checkpoint is intact: restore the folder from a copy, or train again'
  else:
    fix = f'step {intact} is intact: to resume from step {intact}, delete {folder} and run again'
  return CheckpointError(f'checkpoint step {step} in {folders.root} is damaged: {damage}; {fix}')


def _newest_intact(folders: StepFolders, *, before: int) -> int | None:
  for step, folder in sorted(folders.finished().items(), reverse=True):
    if step >= before:
      continue
    try:
      content = manifest.read(folder)
    except (DamagedManifest, CheckpointError):
      continue
    everything = manifest.find_damage(
      folder, manifest=content, is_needed=_file_filter(None), share=slice(None)
    )
    if everything is None:
      return step
  return None


def _compare(
  folder: Path,
  *,
  content: Manifest,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  prefix: str,
  partial: bool,
) -> None:
  saved = {
    path: spec
    for path, spec in content.leaves.items()
    if path.startswith(prefix) and (path in wanted or not partial)
  }
  phrases = tree.differences(saved, wanted=tree.leaf_specs(wanted))
  if phrases:
    raise CheckpointError(
      f'checkpoint {folder} does not fit the configuration: {tree.summarize(phrases)}; '
      'use the configuration it was trained with, or another model directory'
    )


def _info(folder: Path, *, content: Manifest) -> CheckpointInfo:
  every = tuple(
    json.loads((folder / commit.extras_name(process)).read_bytes())
    for process in range(content.num_processes)
  )
  same_layout = content.num_processes == jax.process_count()
  return CheckpointInfo(
    step=content.step,
    metrics=content.metrics,
    extras=every[jax.process_index() if same_layout else 0],
    process_extras=every,
    leaves=content.leaves,
  )
