"""The tiny run as one of several processes, by way of the command's own flags for hosts.

python host_run.py MODEL_DIR --mesh=2,1,2 --emulate_devices=2 --num_processes=2 --process_id=0
--coordinator_address=localhost:PORT prints a line when it starts and after each step,
the loss of each, and `done STEP` or `stopped STEP`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from exitax import parallel, training
from exitax.commands import flags as flag_groups
from exitax.commands.hosts import joined_hosts

_spec = importlib.util.spec_from_file_location('tiny_run', Path(__file__).with_name('tiny_run.py'))
tiny_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_run)


def make_config(root: Path, mesh: tuple[int, int, int], **loop: Any) -> training.RunConfig:
  """The tiny run on a mesh data x pipeline x tensor."""
  config = tiny_run.make_config(root, **{'log_period': 1, **loop})
  return dataclasses.replace(
    config,
    mesh=parallel.MeshConfig(*mesh),
    pipeline=training.PipelineConfig(num_microbatches=2),
  )


class _Announcing(training.QuietDisplay):
  """Prints every step, takes its time so that there is some to be stopped in, and shows losses."""

  def __init__(self, pause: float) -> None:
    self._pause = pause

  def advance(self, step: int) -> None:
    print(f'step {step}', flush=True)
    time.sleep(self._pause)

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    print('metrics', json.dumps({'step': step, 'loss': metrics['train/loss']}), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('model_dir', type=Path)
  parser.add_argument('--mesh', required=True)
  parser.add_argument('--train_steps', type=int, default=12)
  parser.add_argument('--checkpoint_period', type=int, default=3)
  parser.add_argument('--keep_latest', type=int, default=2)
  parser.add_argument('--pause', type=float, default=0.0)
  parser.add_argument('--learning_rate', type=float, default=1e-2)
  flag_groups.add_device_flags(parser)
  flag_groups.add_host_flags(parser)
  flags = parser.parse_args()
  flag_groups.start_jax(flags)
  mesh = tuple(int(size) for size in flags.mesh.split(','))
  config = make_config(
    flags.model_dir.parent,
    mesh,
    train_steps=flags.train_steps,
    checkpoint_period=flags.checkpoint_period,
  )
  optimizer = dataclasses.replace(config.optimizer, learning_rate=flags.learning_rate)
  kept = dataclasses.replace(config.checkpoint, keep_latest=flags.keep_latest)
  config = dataclasses.replace(config, optimizer=optimizer, checkpoint=kept)
  with joined_hosts(flags, [f'mesh = {flags.mesh}', f'train_steps = {flags.train_steps}']):
    print('start', jax.process_count(), jax.device_count(), flush=True)
    result = training.train(config, flags.model_dir, display=_Announcing(flags.pause))
    print(f'{"done" if result.finished else "stopped"} {result.step}', flush=True)


if __name__ == '__main__':
  main()
