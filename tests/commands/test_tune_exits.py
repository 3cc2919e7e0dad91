"""`exitax tune-exits`: a model directory in, the same model with exits out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from exitax.checkpoint import load_model, read_model
from exitax.layers import HeadKind
from exitax.models import ExitConfig, ExitMatrix
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from tests.commands.conftest import RunCommand


def tuning(tiny_gin: Path, backbone: Path, out: Path, *more: str) -> tuple[str, ...]:
  """The command on the tiny corpus, with exits that the backbone does not have."""
  return (
    'tune-exits',
    '--gin_file=runs/ee_tune.gin',
    f'--backbone={backbone}',
    f'--model_dir={out}',
    '--gin.MIXTURE_OR_TASK_NAME=@Task()',
    "--gin.Task.name='notes'",
    '--gin.Task.source=@TextSource()',
    f"--gin.TextSource.paths=('{tiny_gin.parent / 'corpus'}',)",
    '--gin.DataConfig.split=@SplitConfig()',
    '--gin.SplitConfig.fraction=0.3',
    "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
    '--gin.BATCH_SIZE=8',
    '--gin.TRAIN_STEPS=4',
    '--gin.LoopConfig.checkpoint_period=2',
    '--gin.exits.layers=(1, 2)',
    "--gin.exits.head='mlp'",
    *more,
  )


def load(path: Path):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  return load_model(path, mesh=mesh, rules=ShardingRules())


def test_exits_are_tuned_and_used(
  exitax: RunCommand, tiny_gin: Path, trained: Path, tmp_path: Path
) -> None:
  out = tmp_path / 'tuned'
  found = exitax(*tuning(tiny_gin, trained, out))
  assert (found.status, found.err) == (0, '')
  before, after = load(trained), load(out)
  exits = tuple(ExitConfig(layer=n, head=HeadKind.MLP, matrix=ExitMatrix.FINAL) for n in (1, 2))
  assert after.model.config == dataclasses.replace(before.model.config, exits=exits)
  for name in ('embed', 'blocks', 'norm'):
    pairs = zip(
      jax.tree.leaves(before.params[name]), jax.tree.leaves(after.params[name]), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in pairs), name
  texts = [
    exitax(
      'generate',
      f'--model_dir={path}',
      '--prompt=w1',
      '--json',
      '--max_new_tokens=6',
      '--strategy=full',
    )
    for path in (trained, out)
  ]
  assert json.loads(texts[0].out)['tokens'] == json.loads(texts[1].out)['tokens']
  metrics = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
  assert not any('train/final/nll' in line for line in metrics)
  assert any('held_out/final/nll' in line for line in metrics)


def test_tuning_resumes(exitax: RunCommand, tiny_gin: Path, trained: Path, tmp_path: Path) -> None:
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert exitax(*tuning(tiny_gin, trained, whole)).status == 0
  assert exitax(*tuning(tiny_gin, trained, parts)).status == 0
  (parts / 'checkpoints' / '4' / 'manifest.json').unlink()
  again = exitax(*tuning(tiny_gin, trained, parts))
  assert 'resuming from step 2' in again.out
  pairs = zip(jax.tree.leaves(load(whole).params), jax.tree.leaves(load(parts).params), strict=True)
  assert all(np.array_equal(a, b) for a, b in pairs)


def test_mistakes_are_one_line(
  exitax: RunCommand, tiny_gin: Path, trained: Path, tmp_path: Path
) -> None:
  cases = {
    'tune-exits needs a run': ('tune-exits', f'--backbone={trained}'),
    'BACKBONE is required: add --backbone=DIR': (
      *(part for part in tuning(tiny_gin, trained, tmp_path / 'a') if 'backbone' not in part),
    ),
    "RunConfig.trained='all' is not tuning exits": tuning(
      tiny_gin,
      trained,
      tmp_path / 'a',
      "--gin.RunConfig.trained='all'",
      '--gin.exit_weights.start=(1, 1)',
      '--gin.ObjectiveConfig.exit_weights=@exit_weights()',
    ),
    'exit layer 3 is out of range': tuning(
      tiny_gin, trained, tmp_path / 'a', '--gin.exits.layers=(1, 3)'
    ),
    'model.json does not exist': tuning(tiny_gin, tmp_path / 'nothing', tmp_path / 'a'),
  }
  for message, command in cases.items():
    found = exitax(*command)
    assert found.status == 2, message
    assert message in found.err
    assert len(found.err.strip().splitlines()) == 1
  assert not (tmp_path / 'a').exists()
  assert read_model(trained)
