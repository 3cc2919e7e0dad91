"""gin at the edge: which classes files may configure, how files are found, what is checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin.config

import gin
from exitax import checkpoint, data, evaluate, models, objectives, parallel, training
from exitax.commands.gin_types import allows, described, parameter_types
from exitax.data import group_tasks
from exitax.errors import UserError, choose
from exitax.evaluate.advice import AdviseConfig
from exitax.evaluate.calibration import CalibrateConfig
from exitax.layers import HeadKind, LoraConfig, RopeConfig

Built = TypeVar('Built')

_MACRO = 'gin.macro'
# All that files may configure, by the name that they call it.
_CONFIGURABLE: dict[str, Callable[..., Any]] = {}

CONFIGURABLE_CLASSES: tuple[type, ...] = (
  models.ModelConfig,
  models.ExitConfig,
  models.DropoutConfig,
  RopeConfig,
  LoraConfig,
  objectives.ObjectiveConfig,
  objectives.ExitCurriculum,
  objectives.ExitWeight,
  data.DataConfig,
  data.GroupDataConfig,
  data.GroupMix,
  group_tasks.Teacher,
  group_tasks.EnumerationTask,
  group_tasks.FloydWarshallTask,
  group_tasks.TreeSumTask,
  group_tasks.TemplateTask,
  data.SplitConfig,
  data.BpeVocabulary,
  data.ByteVocabulary,
  data.SavedVocabulary,
  data.Task,
  data.Mixture,
  data.WeightedTask,
  data.PythonLibrarySource,
  data.TextSource,
  data.JsonlSource,
  data.TfdsSource,
  parallel.MeshConfig,
  parallel.ShardingRules,
  checkpoint.CheckpointConfig,
  training.OptimizerConfig,
  training.LoopConfig,
  training.PipelineConfig,
  training.RunConfig,
  evaluate.EvaluateConfig,
  AdviseConfig,
  CalibrateConfig,
)


def exits(layers: Sequence[int], *, head: str = 'norm', matrix: str = 'final') -> tuple[Any, ...]:
  """Exits of one kind after each of `layers`: the short way to write `ModelConfig.exits`."""
  kind = choose(HeadKind, head, name='exits.head')
  source = choose(models.ExitMatrix, matrix, name='exits.matrix')
  return tuple(models.ExitConfig(layer=n, head=kind, matrix=source) for n in layers)


def model_of(
  model_dir: str,
  *,
  exits: Sequence[Any] | None = None,
  max_length: int | None = None,
  precision: str | None = None,
  remat: str | None = None,
  lora: LoraConfig | None = None,
) -> Any:
  """The configuration of the model in a directory, with other exits if given: for `RunConfig.model`.

  Raises:
    UserError: there is no model, or the exits do not fit it.
  """
  config, _ = checkpoint.read_model(model_dir)
  given = {'exits': exits, 'max_length': max_length, 'precision': precision, 'remat': remat}
  # The model's own adapters, if any, are merged when it is loaded to go on from.
  return dataclasses.replace(
    config, lora=lora, **{name: value for name, value in given.items() if value is not None}
  )


def tokenizer_of(model_dir: str) -> str:
  """Where the tokenizer of a model directory is: for `SavedVocabulary.path`."""
  return str(checkpoint.tokenizer_directory(model_dir))


def exit_weights(
  start: Sequence[float],
  *,
  end: Sequence[float] | None = None,
  steps: int = 0,
  curve: str = 'constant',
) -> tuple[Any, ...]:
  """One weight per exit, all on the same curve: for `ObjectiveConfig.exit_weights`.

  Raises:
    UserError: `start` and `end` are not of the same length.
  """
  shape = choose(objectives.WeightCurve, curve, name='exit_weights.curve')
  ends = tuple(end) if end is not None else tuple(start)
  if len(ends) != len(start):
    raise UserError(f'exit_weights: {len(start)} start and {len(ends)} end weights: give as many')
  return tuple(
    objectives.ExitWeight(start=first, end=last, steps=steps, curve=shape)
    for first, last in zip(start, ends, strict=True)
  )


def feature_length(lengths: Mapping[str, int]) -> int:
  """Row length from T5X's TASK_FEATURE_LENGTHS: its 'targets' entry.

  Raises:
    UserError: no such entry.
  """
  if 'targets' not in lengths:
    raise UserError(f"TASK_FEATURE_LENGTHS={dict(lengths)} lacks 'targets', the length of a row")
  return int(lengths['targets'])


def make_configurable(kind: Callable[..., Any], *, name: str | None = None) -> None:
  """Makes a class or function known to gin, by its own name or another."""
  with gin.unlock_config():  # Commands are imported after others have run, as in tests.
    gin.external_configurable(kind, name=name, module='exitax')
  _CONFIGURABLE[name or kind.__name__] = kind


@functools.cache
def register() -> None:
  """Makes the classes and helpers of all commands known to gin, once."""
  helpers = (exits, model_of, tokenizer_of, exit_weights, feature_length, training.muon)
  for item in (*CONFIGURABLE_CLASSES, *helpers):
    make_configurable(item)
  # Commands register what they alone read, so that every file is valid for every command.
  for command in ('train', 'generate', 'serve', 'think', 'tune_confidence'):
    importlib.import_module(f'exitax.commands.{command}')
  # Files are files: gin would also look inside Python packages, and takes a folder of the same name
  # as `include 'runs/...'` in the current directory for one that it cannot read.
  gin.config._FILE_READERS[:] = [(open, os.path.isfile)]
  gin.config.register_finalize_hook(_check_macros)
  gin.config.register_finalize_hook(_check_types)


def search_paths(extra: Iterable[str]) -> list[str]:
  """Where gin files are looked for: the given folders, here, the checkout, the installation."""
  checkout = Path(__file__).resolve().parents[2]
  installed = Path(sysconfig.get_path('data')) / 'share' / 'exitax'
  places = [Path(), checkout, checkout / 'gin', installed, installed / 'gin']
  return [*extra, *(str(place) for place in places)]


def parse(
  files: Sequence[str],
  bindings: Sequence[str],
  *,
  extra_paths: Sequence[str] = (),
  text: str = '',
  if_required: Mapping[str, object] | None = None,
) -> None:
  """Reads `text`, then files, then bindings; later ones win.

  Macros in `if_required` that the files require (`%gin.REQUIRED`) get that value.

  Raises:
    UserError: a file that is not there, a name that nothing has, a macro that nothing uses, a
      value that is not written in Python.
  """
  register()
  gin.clear_config()
  paths = search_paths(extra_paths)
  for path in paths:
    gin.add_config_file_search_path(path)
  for file in files:
    _check_found(file, paths)
  with gin.unlock_config():
    try:
      if text:
        gin.parse_config(text)
      for file in files:
        gin.parse_config_file(file, print_includes_and_imports=False)
      for macro, value in (if_required or {}).items():
        if _is_required(macro):
          gin.parse_config(f'{macro} = {value!r}')
      for binding in bindings:
        gin.parse_config(binding)
    except (ValueError, TypeError, SyntaxError, OSError, AttributeError) as error:
      raise _translate(error, bindings) from None
  try:
    gin.finalize()
  except ValueError as error:
    raise _translate(error, bindings) from None


def build(kind: Callable[..., Built]) -> Built:
  """Calls a configurable with what the files bind.

  Raises:
    UserError: a required value is missing, or a value is out of range.
  """
  try:
    return gin.get_configurable(kind)()
  except UserError:
    raise
  except (RuntimeError, TypeError, ValueError) as error:
    raise _translate(error, ()) from None


def operative_lines() -> list[str]:
  """Everything that was in force, one line 'name = value' each, without comments."""
  text = gin.operative_config_str(max_line_length=1 << 20)
  return [line for line in text.splitlines() if line and not line.startswith('#')]


def _is_required(macro: str) -> bool:
  try:
    # A constant comes back as the reference `%gin.REQUIRED`.
    return 'gin.REQUIRED' in repr(gin.query_parameter(f'%{macro}'))
  except ValueError:  # No file sets it.
    return False


def _check_found(file: str, paths: Iterable[str]) -> None:
  if not any((Path(path) / file).is_file() for path in paths):
    raise UserError(
      f'--gin_file={file} is not there: name a file, or one below gin/ such as runs/quickstart.gin'
    )


def _check_macros(config: Mapping[tuple[str, str], Any]) -> None:
  assigned = {scope for scope, selector in config if selector == _MACRO}
  references = (ref.config_key for ref in gin.config.iterate_references(config))
  used = {scope for scope, selector in references if selector == _MACRO}
  for name in sorted(assigned - used):
    raise UserError(f'macro {name} is set but nothing uses it{_close(name, used)}')


def _check_types(config: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
  for (_, selector), bound in config.items():
    name = selector.rsplit('.', 1)[-1]
    types = parameter_types(_CONFIGURABLE[name]) if name in _CONFIGURABLE else {}
    for parameter in bound.keys() & types.keys():
      value = _without_macros(bound[parameter], config)
      if not allows(types[parameter], value, is_reference=_is_reference):
        raise UserError(f'{name}.{parameter}={value!r}: write {described(types[parameter])}')


def _is_reference(value: Any) -> bool:
  return isinstance(value, gin.config.ConfigurableReference)


def _without_macros(value: Any, config: Mapping[tuple[str, str], Mapping[str, Any]]) -> Any:
  """The value with macros replaced by theirs; one that is not set stays."""
  if isinstance(value, (tuple, list)):
    return type(value)(_without_macros(item, config) for item in value)
  if _is_reference(value) and value.config_key[1] == _MACRO and value.config_key in config:
    return _without_macros(config[value.config_key]['value'], config)
  return value


def _translate(error: Exception, bindings: Sequence[str]) -> UserError:
  """gin's message as one line with the fix."""
  if isinstance(error, UserError):
    return UserError(str(error).strip().splitlines()[0])
  lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
  message = lines[0] if lines else type(error).__name__
  if match := re.search(r"'([\w.]+)' doesn't have a parameter named '(\w+)'", message):
    kind, name = match.groups()
    return UserError(f'{kind} has no parameter {name}{_close(name, _parameters(kind))}')
  if match := re.search(r"No configurable matching '([^']+)'", message):
    name = match.group(1)
    return UserError(f'nothing called {name} can be configured{_close(name, _CONFIGURABLE)}')
  if match := re.search(
    r'Required bindings for `?([\w.]+)`? not provided in config: (.*)', message
  ):
    return UserError(f'{match.group(1)} needs {match.group(2)}: bind it in a gin file or a flag')
  if match := re.search(r'No values supplied .*arguments: (.*?)\.?$', message):
    return UserError(f'a required value is missing, {match.group(1)}: bind it in a gin file')
  if match := re.search(r'(\w+)\.__init__\(\) missing .* arguments?: (.*)', message):
    return UserError(f'{match.group(1)} needs {match.group(2)}: name a run file with --gin_file')
  if match := re.search(r'(\w+)/macro.value set to .%gin.REQUIRED', message):
    return UserError(f'{match.group(1)} is required: {_how_to_set(match.group(1))}')
  if match := re.search(r"No bindings specified for '(\w+)/gin.macro'", message):
    return UserError(f'macro {match.group(1)} is used but never set: {_how_to_set(match.group(1))}')
  if 'malformed node' in message:
    where = f'{bindings[-1]!r}' if bindings else lines[-1]
    return UserError(f'{where}: the value is not Python; strings need quotes, names an @ or a %')
  where = f' in {bindings[-1]!r}' if isinstance(error, SyntaxError) and bindings else ''
  return UserError(f'configuration{where}: {message}')


def _how_to_set(macro: str) -> str:
  own_flags = {'MODEL_DIR': '--model_dir=DIR', 'BACKBONE': '--backbone=DIR'}
  return f'add {own_flags.get(macro, f"--gin.{macro}=VALUE")}'


def _parameters(kind: str) -> Iterable[str]:
  name = kind.rsplit('.', 1)[-1]
  return parameter_types(_CONFIGURABLE[name]) if name in _CONFIGURABLE else ()


def _close(name: str, known: Iterable[str]) -> str:
  known = sorted(known)
  matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if matches:
    return f': did you mean {matches[0]}?'
  return f': known are {", ".join(known)}' if known else ''
