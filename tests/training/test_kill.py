"""Killed at any moment, told to stop, started again: the final parameters are always the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from exitax import checkpoint, parallel, training

PROGRAM = Path(__file__).with_name('tiny_run.py')
STEPS = 12


class _Run:
  """The program in a process of its own, on one device."""

  def __init__(self, model_dir: Path, environment: dict[str, str]) -> None:
    self._process = subprocess.Popen(
      [sys.executable, str(PROGRAM), str(model_dir)],
      env={**environment, 'JAX_NUM_CPU_DEVICES': '1'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def wait_for(self, line: str) -> None:
    """Reads its output up to the line that starts so."""
    assert self._process.stdout is not None
    for got in self._process.stdout:
      if got.startswith(line):
        return
    errors = self._process.communicate()[1]
    raise AssertionError(f'ended with {self._process.returncode} before {line!r}: {errors}')

  def kill(self) -> None:
    assert self._process.poll() is None
    self._end(signal.SIGKILL)
    assert self._process.returncode == -signal.SIGKILL

  def terminate(self) -> str:
    """Tells it to stop; its last words."""
    output = self._end(signal.SIGTERM)
    return output.splitlines()[-1]

  def finish(self) -> str:
    """Lets it end; its last words."""
    return self._end(None).splitlines()[-1]

  def close(self) -> None:
    """Leaves nothing running, whatever happened."""
    self._process.kill()
    self._process.communicate()

  def _end(self, number: int | None) -> str:
    if number is not None:
      os.kill(self._process.pid, number)
    output, errors = self._process.communicate(timeout=300)
    assert number == signal.SIGKILL or self._process.returncode == 0, errors
    return output


def _final(model_dir: Path) -> checkpoint.LoadedModel:
  mesh = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
  return checkpoint.load_model(model_dir, mesh=mesh, rules=parallel.ShardingRules())


def _uninterrupted(start: Callable[[str], _Run]) -> str:
  return start('straight').finish()


def _killed_again_and_again(start: Callable[[str], _Run]) -> str:
  """In the middle of a commit, anywhere after it, and while starting again."""
  run = start('killed')
  run.wait_for(f'saving {random.choice([3, 6])}')
  time.sleep(random.uniform(0, 0.3))
  run.kill()
  run = start('killed')
  run.wait_for('step')
  time.sleep(random.uniform(0, 0.6))
  run.kill()
  run = start('killed')
  run.wait_for('start')
  time.sleep(random.uniform(0, 3))
  run.kill()
  return start('killed').finish()


def _stopped_politely(start: Callable[[str], _Run]) -> str:
  run = start('stopped')
  run.wait_for('step 4')
  last_words = run.terminate()
  # The step under way is finished and saved, though no checkpoint was due.
  assert last_words in ('stopped 4', 'stopped 5', 'stopped 6')
  step = int(last_words.split()[1])
  run = start('stopped')
  run.wait_for(f'step {step + 1}')
  return run.finish()


@pytest.mark.slow
@pytest.mark.processes
def test_every_way_of_being_stopped_ends_with_the_same_parameters(
  tiny: ModuleType, tmp_path: Path, subprocess_env: dict[str, str]
) -> None:
  tiny.write_text(tmp_path / 'text')

  runs: list[_Run] = []

  def start(name: str) -> _Run:
    runs.append(_Run(tmp_path / name, subprocess_env))
    return runs[-1]

  stories = (_uninterrupted, _killed_again_and_again, _stopped_politely)
  try:
    with ThreadPoolExecutor(len(stories)) as pool:
      last_words = list(pool.map(lambda story: story(start), stories))
  finally:
    for run in runs:
      run.close()
  assert last_words == [f'done {STEPS}'] * 3
  wanted = _final(tmp_path / 'straight')
  assert wanted.step == STEPS
  for name in ('killed', 'stopped'):
    got = _final(tmp_path / name)
    assert got.step == STEPS
    jax.tree.map(np.testing.assert_array_equal, got.params, wanted.params)
    losses = {
      line['step']: line['train/loss']
      for line in training.read_metrics(tmp_path / name)
      if 'train/loss' in line
    }
    assert list(losses) == sorted(losses)
    assert list(losses)[-1] == STEPS
    for line in training.read_metrics(tmp_path / 'straight'):
      if 'train/loss' in line and name == 'killed':
        assert losses[line['step']] == line['train/loss']
