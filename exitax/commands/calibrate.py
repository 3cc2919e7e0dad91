r"""Certifies an exit threshold: the lowest at which text changes no more than you allow.

  exitax calibrate --model_dir=runs/quickstart
  exitax calibrate --model_dir=runs/quickstart --metric=rouge --risk=0.05 --confidence=0.9
  exitax calibrate --model_dir=runs/quickstart --prompt_file=runs/prompts.jsonl --max_new_tokens=32

Examples are drawn by chance from the text that was held out of training (MODEL_DIR/config.gin names
it), or from --prompt_file: lines of text, or *.jsonl with a field `prompt` or `text`. Each is decoded at every
threshold and compared with full depth. If a threshold passes, MODEL_DIR/certificate.json is written, and
`exitax generate --threshold=certified` uses it; table and picture go to MODEL_DIR/calibration/.
Choose metric, risk and measure before you look: trying several until one passes voids the guarantee.

Exit status: 0 certified, 3 the examples do not support it (no certificate is written, an older one stays),
2 a mistake in the command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from exitax.checkpoint import (
  LoadedModel,
  checkpoint_digest,
  load_model,
  read_model,
  write_certificate,
)
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.evaluate import training_config
from exitax.data import DataConfig, build_data, progress_bar
from exitax.errors import UserError
from exitax.evaluate.calibration import (
  CalibrateConfig,
  CalibrationReport,
  Examples,
  calibrate,
  file_examples,
  held_out_examples,
  make_certificate,
  render_calibration,
  write_calibration,
)
from exitax.parallel import MeshConfig, ShardingRules, make_mesh

CALIBRATION_FOLDER = 'calibration'
REFUSED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_checkpoint_flags(parser)
  goal = parser.add_argument_group('guarantee')
  goal.add_argument(
    '--metric',
    metavar='NAME',
    help='token_agreement (the default), rouge, exact_match or bits_per_byte',
  )
  goal.add_argument('--risk', type=float, metavar='R', help='limit of the expected loss (0.02)')
  goal.add_argument('--confidence', type=float, metavar='C', help='that it holds (0.95)')
  goal.add_argument(
    '--method', metavar='NAME', help='ltt (Learn then Test, the default) or crc (in expectation)'
  )
  how = parser.add_argument_group('decoding')
  how.add_argument('--measure', metavar='NAME', help='max_prob (the default), margin, entropy, ...')
  how.add_argument('--strategy', metavar='NAME', help='deferred (the default), ...')
  how.add_argument('--max_new_tokens', type=int, metavar='N', help='64 by default')
  how.add_argument('--batch_size', type=int, metavar='N', help='prompts at once (32)')
  examples = parser.add_argument_group('examples')
  examples.add_argument('--examples', type=int, metavar='N', help='at most (500)')
  examples.add_argument('--prompt_tokens', type=int, metavar='N', help='length of prompts (32)')
  examples.add_argument('--prompt_file', metavar='FILE', help='prompts of your own')
  examples.add_argument('--seed', type=int, metavar='N', help='which are drawn (0)')
  parser.add_argument('--json', action='store_true', help='one JSON object in place of the table')
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Calibrates."""
  flag_groups.start_jax(flags)
  if not flags.model_dir:
    raise UserError('calibrate needs a model: --model_dir=DIR, such as runs/quickstart')
  model_dir = Path(flags.model_dir)
  read_model(model_dir)  # Says what is wrong with a directory that holds no model.
  text = '' if flags.prompt_file else training_config(model_dir)
  flag_groups.parse_gin(flags, text=text, bind_model_dir=False)
  config = flag_groups.override(gin_config.build(CalibrateConfig), flags)
  folder = flag_groups.make_folder(model_dir / CALIBRATION_FOLDER, name='model_dir')
  mesh, rules = make_mesh(MeshConfig(), jax.devices()[:1]), ShardingRules()
  loaded = load_model(model_dir, mesh=mesh, rules=rules, step=flags.step, exits=flags.exits)
  examples = _examples(flags, loaded, config)
  report = calibrate(loaded, examples, config, mesh=mesh, rules=rules, progress=progress_bar)
  files = [str(path) for path in write_calibration(report, folder)]
  certified = report.decision.threshold is not None
  if certified:
    digest = checkpoint_digest(model_dir, step=loaded.step)
    certificate = make_certificate(report, checkpoint_digest=digest)
    files.insert(0, str(write_certificate(model_dir, certificate)))
  _print(report, files, as_json=flags.json)
  return 0 if certified else REFUSED


def _examples(flags: argparse.Namespace, loaded: LoadedModel, config: CalibrateConfig) -> Examples:
  if flags.prompt_file:
    return file_examples(
      flags.prompt_file,
      loaded.tokenizer,
      config,
      max_length=loaded.model.config.max_length,
    )
  longest = loaded.model.config.max_length
  if config.prompt_tokens + config.max_new_tokens > longest:
    raise UserError(
      f'prompt_tokens={config.prompt_tokens} plus max_new_tokens={config.max_new_tokens} exceeds the '
      f'context of {longest}: lower one of them'
    )
  data = build_data(gin_config.build(DataConfig), tokenizer=loaded.tokenizer)
  return held_out_examples(data, config)


def _print(report: CalibrationReport, files: list[str], *, as_json: bool) -> None:
  if as_json:
    print(json.dumps({**report.to_dict(), 'files': files}), flush=True)
    return
  print(render_calibration(report))
  print(f'written: {", ".join(files)}')
