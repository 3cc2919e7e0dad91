"""Speed-up at 1% quality loss, certified: wall-clock of a calibrated threshold beside full depth.

  exitax quickstart
  python benchmarks/thresholds.py [--quick] [--model_dir=runs/quickstart]

For each loss the lowest threshold is certified on held-out text by Learn then Test (expected loss at most 1%,
confidence 95%), as `exitax calibrate` does; then other held-out prompts are decoded one at a time with
that threshold and with every layer, in turns. Where nothing is certified every layer runs, and the
speed-up is 1. The goal is about bits per byte, the quality of what the model predicts; tokens of the text
that it writes, and speculation, which changes none, stand beside it. No model is trained here: with
`--model_dir` any model that `exitax train` wrote is measured, a LayerSkip run for instance.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
from common import Goal, finish, say

from exitax.checkpoint import LoadedModel, load_model
from exitax.commands import gin_config
from exitax.commands.evaluate import training_config
from exitax.data import Data, DataConfig, build_data
from exitax.decode import DeferredExit, ExitPolicy, FullDepth, Speculative
from exitax.evaluate import PromptDecoder, held_out_prompts
from exitax.evaluate.advice import PolicySpeed, time_policies
from exitax.evaluate.calibration import (
  CalibrateConfig,
  CalibrationReport,
  Metric,
  calibrate,
  held_out_examples,
)
from exitax.parallel import MeshConfig, ShardingRules, make_mesh, use

RISK, CONFIDENCE = 0.01, 0.95
GOAL_METRIC = Metric.BITS_PER_BYTE


def main() -> None:
  """Calibrates every loss, times the certified thresholds, and prints a table and one JSON object."""
  flags = _flags()
  model_dir = Path(flags.model_dir)
  if not (model_dir / 'model.json').exists():
    raise SystemExit(
      f'{model_dir} holds no model: run `exitax quickstart` first, or give --model_dir=DIR'
    )
  mesh, rules = make_mesh(MeshConfig(), jax.devices()[:1]), ShardingRules()
  loaded = load_model(model_dir, mesh=mesh, rules=rules)
  gin_config.parse([], [], text=training_config(model_dir))
  data = build_data(gin_config.build(DataConfig), tokenizer=loaded.tokenizer)
  # Without any loss 299 examples are the least that bound it by 1% with confidence 95%.
  examples = 320 if flags.quick else 1000
  reports: dict[str, CalibrationReport] = {}
  for metric in (GOAL_METRIC, Metric.TOKEN_AGREEMENT):
    say(f'calibrating {metric.value} on {examples} examples')
    config = CalibrateConfig(
      metric=metric,
      risk=RISK,
      confidence=CONFIDENCE,
      examples=examples,
      max_new_tokens=32 if flags.quick else 64,
    )
    drawn = held_out_examples(data, config)
    reports[metric.value] = calibrate(loaded, drawn, config, mesh=mesh, rules=rules)
  with use(mesh, rules):
    speeds = _time(loaded, data, reports, quick=flags.quick)
  rows = [_row(name, report, speeds.get(name, speeds['full'])) for name, report in reports.items()]
  rows.append(_lossless_row(speeds['speculative, adaptive']))
  goal = next(row for row in rows if row['loss'] == GOAL_METRIC.value)
  finish(
    'thresholds',
    rows,
    [Goal(name='certified_speedup', value=goal['speed_up'], op='>=', goal=2.0)],
  )


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
  parser.add_argument('--quick', action='store_true', help='a few minutes, rough numbers')
  parser.add_argument('--model_dir', default='runs/quickstart', metavar='DIR')
  return parser.parse_args()


def _time(
  loaded: LoadedModel, data: Data, reports: dict[str, CalibrationReport], *, quick: bool
) -> dict[str, PolicySpeed]:
  """All certified thresholds in turns with full depth, and so do speculation and no loss at all."""
  policies: dict[str, ExitPolicy] = {'full': FullDepth()}
  for name, report in reports.items():
    if report.decision.threshold is not None:
      policies[name] = DeferredExit(threshold=report.decision.threshold)
  policies['speculative, adaptive'] = Speculative()
  new_tokens = 64 if quick else 192
  decoder = PromptDecoder(
    loaded.model,
    loaded.params,
    held_out_prompts(data, count=3 if quick else 8, num_tokens=32),
    new_tokens=new_tokens,
    confidence=CalibrateConfig().measure,
  )
  say(f'timing {", ".join(policies)}')
  return time_policies(decoder, policies, repeats=3 if quick else 9, max_seconds=600)


def _row(name: str, report: CalibrationReport, speed: PolicySpeed) -> dict[str, Any]:
  decision = report.decision
  index = 0
  if decision.threshold is not None:
    index = [row.threshold for row in decision.rows].index(decision.threshold)
  layers = report.layers[index]
  return {
    'loss': name,
    'certified': decision.threshold if decision.threshold is not None else 'nothing',
    'examples': decision.examples,
    'risk': decision.rows[index].risk,
    'bound': decision.rows[index].bound,
    'layers_per_token': layers,
    'in_layers': report.model.num_layers / layers,
    **_speed(speed),
  }


def _lossless_row(speed: PolicySpeed) -> dict[str, Any]:
  return {'loss': 'none: speculation', 'certified': 'exact', 'risk': 0.0, **_speed(speed)}


def _speed(speed: PolicySpeed) -> dict[str, Any]:
  return {
    'tokens_per_s': speed.tokens_per_second,
    'speed_up': speed.speed_up,
    'same_text': speed.same_text,
  }


if __name__ == '__main__':
  main()
