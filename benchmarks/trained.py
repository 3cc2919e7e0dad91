"""Models that a benchmark needs trained: found, or trained by the command in their gin file."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
from common import Effort, say

from exitax.checkpoint import LoadedModel, load_model
from exitax.commands import gin_config
from exitax.commands.train import CONFIG_FILE
from exitax.data import Data, DataConfig, build_data
from exitax.evaluate import held_out_prompts
from exitax.layers import Precision
from exitax.models import ExitLM
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from exitax.training import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# A model of seconds, to see that a benchmark works; what it measures means nothing.
SHORT = (
  '--gin.TRAIN_STEPS=40',
  '--gin.BATCH_SIZE=4',
  "--gin.TASK_FEATURE_LENGTHS={'targets': 64}",
  '--gin.OptimizerConfig.warmup_steps=10',
)


def trained(name: str, effort: Effort) -> LoadedModel:
  """The model of `gin/runs/NAME.gin`, from `runs/NAME`; trained there first if it is missing.

  It computes in float32, whatever it was trained in: rounding makes ties of scores, and texts that are
  to be compared part at them. With `Effort.QUICK` a missing model is trained for seconds only, in
  `runs/NAME_short`.
  """
  directory = ROOT / 'runs' / name
  command = [f'--gin_file=gin/runs/{name}.gin']
  if effort is Effort.QUICK and not directory.exists():
    directory, command = ROOT / 'runs' / f'{name}_short', [*command, *SHORT, *_short_backbone(name)]
  say(f'{directory.relative_to(ROOT)}: training what is missing')
  command = [sys.executable, '-m', 'exitax', 'train', *command, f'--model_dir={directory}']
  # Resumes, and ends at once where nothing is missing.
  subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  loaded = load_model(directory, mesh=mesh, rules=ShardingRules())
  config = dataclasses.replace(loaded.model.config, precision=Precision.FLOAT32)
  return dataclasses.replace(loaded, model=ExitLM(config))


def _short_backbone(name: str) -> list[str]:
  """For a run on another model that is not there: its short stand-in, which comes before it."""
  text = (ROOT / 'gin' / 'runs' / f'{name}.gin').read_text(encoding='utf-8')
  found = re.search(r"^BACKBONE = 'runs/(\w+)'", text, re.MULTILINE)
  if found is None or (ROOT / 'runs' / found[1]).exists():
    return []
  return [f"--gin.BACKBONE='runs/{found[1]}_short'"]


def held_out_loss(loaded: LoadedModel) -> float:
  """Nats per token of the final layer on held-out text, as its training found at the end."""
  key = 'held_out/final/nll'
  return [line[key] for line in read_metrics(loaded.directory) if key in line][-1]


def held_out(loaded: LoadedModel, *, count: int, num_tokens: int) -> list[list[int]]:
  """The beginnings of held-out documents of what a model was trained on."""
  return held_out_prompts(data_of(loaded), count=count, num_tokens=num_tokens)


def parse_training(loaded: LoadedModel) -> None:
  """Binds in gin what was in force when a model was trained."""
  text = (Path(loaded.directory) / CONFIG_FILE).read_text(encoding='utf-8')
  gin_config.parse([], [], text=text)


def data_of(loaded: LoadedModel) -> Data:
  """What a model was trained on."""
  parse_training(loaded)
  return build_data(gin_config.build(DataConfig), tokenizer=loaded.tokenizer)
