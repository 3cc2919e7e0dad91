"""Several processes train one model: told to stop, killed, started again in another number."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from exitax import checkpoint, parallel, training

PROGRAM = Path(__file__).with_name('host_run.py')
STEPS = 12
# Those who are left notice by themselves, at the latest by the heartbeat.
NOTICE_SECONDS = 120


class Host:
  """One process of a run; its output is read as it comes."""

  def __init__(self, command: list[str], environment: dict[str, str]) -> None:
    self.process = subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    self.lines: list[str] = []
    self.errors: list[str] = []
    self._readers = [
      threading.Thread(target=self._read, args=(self.process.stdout, self.lines)),
      threading.Thread(target=self._read, args=(self.process.stderr, self.errors)),
    ]
    for reader in self._readers:
      reader.start()

  def wait_for(self, line: str, seconds: float = 240) -> None:
    """Until it has printed a line that starts so."""
    deadline = time.monotonic() + seconds
    while not any(got.startswith(line) for got in list(self.lines)):
      assert time.monotonic() < deadline and self.process.poll() is None, self.told()
      time.sleep(0.02)

  def end(self, seconds: float = 240) -> int:
    """Its exit status."""
    status = self.process.wait(timeout=seconds)
    for reader in self._readers:
      reader.join()
    return status

  def told(self) -> str:
    return '\n'.join([*self.lines[-20:], *self.errors[-20:]])

  def losses(self) -> dict[int, float]:
    values = [json.loads(x.split(' ', 1)[1]) for x in self.lines if x.startswith('metrics')]
    return {value['step']: value['loss'] for value in values}

  def _read(self, stream, lines: list[str]) -> None:
    with stream:
      for line in stream:
        lines.append(line.rstrip('\n'))


Start = Callable[..., list[Host]]


def _slurm(task: int, tasks: int) -> dict[str, str]:
  """What SLURM tells the tasks of a step on this machine."""
  return {
    'SLURM_JOB_ID': str(os.getpid()),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': str(tasks),
    'SLURM_PROCID': str(task),
    'SLURM_LOCALID': str(task),
  }


@pytest.fixture
def start(subprocess_env: dict[str, str]) -> Iterator[Start]:
  """Starts processes of the tiny run; none is left behind."""
  hosts: list[Host] = []

  def begin(
    model_dir: Path, *, processes: int, devices: int, mesh: str, cluster: str = '', **flags
  ) -> list[Host]:
    with socket.socket() as probe:
      probe.bind(('localhost', 0))
      port = probe.getsockname()[1]
    command = [
      sys.executable,
      str(PROGRAM),
      str(model_dir),
      f'--mesh={mesh}',
      f'--emulate_devices={devices}',
      *(f'--{name}={value}' for name, value in flags.items()),
    ]
    new = []
    for i in range(processes):
      place, environment = [], dict(subprocess_env)
      if cluster == 'slurm':
        place, environment = ['--multihost'], environment | _slurm(i, processes)
      elif processes > 1:
        place = [
          f'--coordinator_address=localhost:{port}',
          f'--num_processes={processes}',
          f'--process_id={i}',
        ]
      new.append(Host([*command, *place], environment))
    hosts.extend(new)
    return new

  yield begin
  for host in hosts:
    host.process.kill()
    host.end()


@pytest.fixture(scope='module')
def host_run() -> ModuleType:
  spec = importlib.util.spec_from_file_location('host_run', PROGRAM)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _params(model_dir: Path, step: int | None = None):
  mesh = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
  loaded = checkpoint.load_model(model_dir, mesh=mesh, rules=parallel.ShardingRules(), step=step)
  return loaded.step, loaded.params


def _finish(hosts: list[Host]) -> None:
  for host in hosts:
    assert host.end() == 0, host.told()
    assert host.lines[-1] == f'done {STEPS}'


@pytest.mark.slow
@pytest.mark.processes
def test_killed_or_told_to_stop_two_processes_go_on_as_if_nothing_had_been(
  start: Start, tmp_path: Path
) -> None:
  run = {'processes': 2, 'devices': 2, 'mesh': '2,1,2'}
  straight = start(tmp_path / 'straight', **run)
  _finish(straight)
  assert 'start 2 4' in straight[1].lines
  assert len(straight[0].losses()) == STEPS

  # A process dies without a word, and the other ends by itself: it says so, or where it waits for
  # the other's part of a checkpoint jax aborts it after the heartbeat's time.
  killed = start(tmp_path / 'killed', pause=0.3, heartbeat_timeout_seconds=30, **run)
  # The save of step 6 waited for the one of step 3.
  killed[0].wait_for('step 8')
  os.kill(killed[1].process.pid, signal.SIGKILL)
  status = killed[0].end(NOTICE_SECONDS)
  lines = [line for line in killed[0].errors if 'another host is gone' in line]
  assert (status, len(lines)) in ((1, 1), (-signal.SIGABRT, 0)), killed[0].told()
  saved = checkpoint.CheckpointManager(checkpoint.checkpoints_directory(tmp_path / 'killed'))
  assert saved.latest_step() in (3, 6)
  killed = start(tmp_path / 'killed', **run)
  _finish(killed)
  assert 1 not in killed[0].losses()

  # One process is told to stop: both do, at the same step. One process alone goes on.
  stopped = start(tmp_path / 'stopped', pause=0.1, **run)
  stopped[1].wait_for('step 4')
  os.kill(stopped[1].process.pid, signal.SIGTERM)
  assert [host.end() for host in stopped] == [0, 0], stopped[0].told()
  assert stopped[0].lines[-1] == stopped[1].lines[-1]
  word, step = stopped[0].lines[-1].split()
  assert word == 'stopped' and 4 <= int(step) < STEPS
  assert _params(tmp_path / 'stopped')[0] == int(step)
  alone = start(tmp_path / 'stopped', processes=1, devices=4, mesh='2,1,2')
  _finish(alone)

  wanted = _params(tmp_path / 'straight')
  assert wanted[0] == STEPS
  jax.tree.map(np.testing.assert_array_equal, _params(tmp_path / 'killed'), wanted)
  # In one process XLA's own collectives take the place of gloo's: the same rows, and sums whose
  # order may differ.
  losses = alone[0].losses()
  assert list(losses) == list(range(int(step) + 1, STEPS + 1))
  for at, loss in losses.items():
    assert loss == pytest.approx(straight[0].losses()[at], rel=1e-5)


@pytest.mark.slow
@pytest.mark.processes
def test_four_processes_that_share_data_and_stages_go_on_as_one_would(
  start: Start, host_run: ModuleType, tmp_path: Path
) -> None:
  """Data 2 x pipeline 2 x tensor 2: each pair of processes loads the same rows.

  They resume what one process saved, told of each other as the tasks of a job of SLURM; one of them
  is killed, and all are started again.
  """
  steps = {'train_steps': 12, 'checkpoint_period': 2}
  config = host_run.make_config(tmp_path, (2, 2, 2), **steps)
  config = dataclasses.replace(config, checkpoint=checkpoint.CheckpointConfig(keep_latest=9))
  alone = training.train(config, tmp_path / 'alone')
  shutil.copytree(tmp_path / 'alone', tmp_path / 'shared')
  for step in range(4, 13, 2):
    shutil.rmtree(tmp_path / 'shared' / 'checkpoints' / str(step))

  run = {'processes': 4, 'devices': 2, 'mesh': '2,2,2', 'cluster': 'slurm', **steps}
  run['keep_latest'] = 9
  killed = start(tmp_path / 'shared', pause=0.3, heartbeat_timeout_seconds=30, **run)
  # The save of step 8 waited for the one of step 6.
  killed[0].wait_for('metrics {"step": 9')
  os.kill(killed[3].process.pid, signal.SIGKILL)
  for host in killed[:3]:
    assert host.end(NOTICE_SECONDS) != 0, host.told()
  # As if the last checkpoint they have all written were that of step 4.
  shutil.copytree(tmp_path / 'shared', tmp_path / 'killed')
  for folder in (tmp_path / 'shared' / 'checkpoints').iterdir():
    if folder.name not in ('2', '4'):
      shutil.rmtree(folder)
  hosts = start(tmp_path / 'shared', **run)
  for host in hosts:
    assert host.end() == 0, host.told()
    assert 'start 4 8' in host.lines
    steps_done = [line for line in host.lines if line.startswith('step')]
    assert steps_done == [f'step {n}' for n in range(5, 13)]
    assert host.lines[-1] == 'done 12'

  # What was lost is done again, bit by bit.
  before, after = killed[0].losses(), hosts[0].losses()
  assert {at: before[at] for at in range(5, 10)} == {at: after[at] for at in range(5, 10)}
  jax.tree.map(
    np.testing.assert_array_equal,
    _params(tmp_path / 'shared', step=6),
    _params(tmp_path / 'killed', step=6),
  )

  lines = {
    name: [line for line in training.read_metrics(tmp_path / name) if 'train/loss' in line]
    for name in ('shared', 'alone')
  }
  assert [line['step'] for line in lines['shared']] == list(range(1, 13))
  for four, one in zip(lines['shared'], lines['alone'], strict=True):
    for name in ('train/loss', 'gradient_norm', 'train/exit_1/nll', 'train/final/accuracy'):
      assert four[name] == pytest.approx(one[name], rel=2e-5), (name, four['step'])
  step, params = _params(tmp_path / 'shared')
  assert step == 12
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5),
    params,
    jax.device_get(alone.params),
  )


@pytest.mark.slow
@pytest.mark.processes
def test_all_processes_end_when_the_run_diverges(start: Start, tmp_path: Path) -> None:
  hosts = start(tmp_path / 'wild', processes=2, devices=1, mesh='2,1,1', learning_rate=1e20)
  for index, host in enumerate(hosts):
    # Status 2 of both: neither was ended by the other's leaving.
    assert host.end() == 2, host.told()
    prefix = f'exitax: process {index} of 2: ' if index else 'exitax: '
    [line] = [line for line in host.errors if line.startswith('exitax: ')]
    assert line.startswith(f'{prefix}training diverged at step '), line
    assert 'no checkpoint was written yet' in line


@pytest.mark.slow
@pytest.mark.processes
def test_a_process_that_freezes_does_not_hold_the_others_for_ever(
  start: Start, tmp_path: Path
) -> None:
  hosts = start(
    tmp_path / 'frozen',
    processes=2,
    devices=1,
    mesh='2,1,1',
    train_steps=1000,
    pause=0.1,
    heartbeat_timeout_seconds=10,
  )
  hosts[1].wait_for('step 4')
  os.kill(hosts[1].process.pid, signal.SIGSTOP)
  # By jax, which knows no exception for it.
  assert hosts[0].end(90) == -signal.SIGABRT, hosts[0].told()
  assert any('heartbeat' in line for line in hosts[0].errors)
