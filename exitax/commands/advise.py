"""Says whether early exit pays for a model, on its data, on this machine, and which kind.

  exitax advise --model_dir=runs/quickstart
  exitax advise --model_dir=runs/quickstart --gin.AdviseConfig.new_tokens=256 --json

It measures how often each exit agrees with the final layer (on held-out text and along the text that the
model writes), what each part of a step takes here, predicts the speed-up of every strategy, and measures
the best of each kind beside its prediction. Tables say which is which. Results go to MODEL_DIR/advice/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from exitax.checkpoint import load_model, read_model
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.evaluate import training_config
from exitax.data import DataConfig, build_data, progress_bar
from exitax.errors import UserError
from exitax.evaluate.advice import AdviseConfig, advise, render_advice, write_advice
from exitax.parallel import MeshConfig, ShardingRules, make_mesh

ADVICE_FOLDER = 'advice'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_checkpoint_flags(parser)
  parser.add_argument('--measure', metavar='NAME', help='max_prob (the default), margin or entropy')
  parser.add_argument('--max_drafts', type=int, metavar='N', help='most drafts a round (7)')
  parser.add_argument('--new_tokens', type=int, metavar='N', help='tokens per prompt (128)')
  parser.add_argument('--output', metavar='DIR', help='where results go (MODEL_DIR/advice)')
  parser.add_argument('--json', action='store_true', help='one JSON object in place of tables')
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Advises."""
  flag_groups.start_jax(flags)
  if not flags.model_dir:
    raise UserError('advise needs a model: --model_dir=DIR, such as runs/quickstart')
  model_dir = Path(flags.model_dir)
  read_model(model_dir)  # Says what is wrong with a directory that holds no model.
  flag_groups.parse_gin(flags, text=training_config(model_dir), bind_model_dir=False)
  config = flag_groups.override(gin_config.build(AdviseConfig), flags)
  folder = flag_groups.make_folder(flags.output or model_dir / ADVICE_FOLDER, name='output')
  mesh, rules = make_mesh(MeshConfig(), jax.devices()[:1]), ShardingRules()
  loaded = load_model(model_dir, mesh=mesh, rules=rules, step=flags.step, exits=flags.exits)
  data = build_data(gin_config.build(DataConfig), tokenizer=loaded.tokenizer)
  report = advise(loaded, data, config, mesh=mesh, rules=rules, progress=progress_bar)
  files = [str(path) for path in write_advice(report, folder)]
  if flags.json:
    print(json.dumps({**report.to_dict(), 'files': files}), flush=True)
  else:
    print(render_advice(report))
    print(f'written: {", ".join(files)}')
  return 0
