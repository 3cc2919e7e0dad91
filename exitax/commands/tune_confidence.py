"""Trains a confidence classifier for every exit of a frozen model; seconds to minutes.

  exitax tune-confidence --model_dir=runs/quickstart
  exitax generate --model_dir=runs/quickstart --prompt='def ' --threshold=0.5 --confidence=classifier

A linear map of the stream at an exit learns whether the exit's best token will be the final layer's
(CALM). While decoding it costs one vector where probabilities cost the vocabulary matrix. Learnt from
the model's own training text, reported on its held-out text; MODEL_DIR/confidence.npz is written, and
nothing of the model changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
from rich.table import Table

from exitax.checkpoint import load_model, read_model, write_classifiers
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.console import CommandConsole
from exitax.commands.evaluate import training_config
from exitax.data import DataConfig, build_data, progress_bar
from exitax.errors import UserError
from exitax.evaluate import (
  ClassifierConfig,
  ClassifierScore,
  collect_streams,
  fit_classifiers,
  score_classifiers,
)
from exitax.parallel import MeshConfig, ShardingRules, make_mesh, use

gin_config.make_configurable(ClassifierConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_model_dir(parser, purpose='the model: what `exitax train` wrote')
  parser.add_argument('--step', type=int, help='which checkpoint (the latest by default)')
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Trains the classifiers."""
  flag_groups.start_jax(flags)
  if not flags.model_dir:
    raise UserError('tune-confidence needs a model: --model_dir=DIR, such as runs/quickstart')
  model_dir = Path(flags.model_dir)
  read_model(model_dir)
  flag_groups.parse_gin(flags, text=training_config(model_dir), bind_model_dir=False)
  config = gin_config.build(ClassifierConfig)
  flag_groups.make_folder(model_dir, name='model_dir')
  mesh, rules = make_mesh(MeshConfig(), jax.devices()[:1]), ShardingRules()
  loaded = load_model(model_dir, mesh=mesh, rules=rules, step=flags.step)
  exits = loaded.model.config.exits
  if not exits:
    raise UserError(f'{model_dir} holds a model without exits: there is nothing to judge')
  data = build_data(gin_config.build(DataConfig), tokenizer=loaded.tokenizer)
  settings = {'max_tokens': config.max_tokens, 'progress': progress_bar}
  held_out = data.eval_loader()
  with use(mesh, rules):
    learnt = collect_streams(
      loaded.model, loaded.params, data.train_loader(), total=config.batches, **settings
    )
    seen = collect_streams(
      loaded.model,
      loaded.params,
      held_out,
      total=min(config.held_out_batches, len(held_out)),
      **settings,
    )
  classifiers = fit_classifiers(learnt, tuple(item.layer for item in exits), config)
  path = write_classifiers(model_dir, classifiers, step=loaded.step)
  _print(score_classifiers(classifiers, seen), tokens=seen.agrees.shape[1])
  print(f'written: {path}')
  return 0


def _print(scores: tuple[ClassifierScore, ...], *, tokens: int) -> None:
  measures = list(scores[0].auroc)
  table = Table(title=f'telling right tokens from wrong ones: AUROC on {tokens:,} held-out tokens')
  for column in ('exit', 'agrees with the final layer', *measures):
    table.add_column(column, justify='right')
  for score in scores:
    values = [f'{score.auroc[name]:.3f}' for name in measures]
    table.add_row(str(score.layer), f'{score.agreement:.1%}', *values)
  CommandConsole(soft_wrap=False).print(table)
