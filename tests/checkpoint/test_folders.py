"""Step folders: what counts as finished, being written, or remains."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from exitax import checkpoint
from exitax.checkpoint import commit, folders
from exitax.checkpoint.manifest import MANIFEST_NAME


def _make(root: Path, *, name: str, content: str | None) -> Path:
  """A step folder, finished if it has content for its manifest."""
  folder = root / name
  folder.mkdir(parents=True)
  if content is not None:
    (folder / MANIFEST_NAME).write_text(content)
  return folder


def test_finished_steps_are_numbers_with_a_manifest(tmp_path: Path) -> None:
  for name in ('10', '9', 'x', '-1', '7.tmp', 'best'):
    _make(tmp_path, name=name, content='')
  _make(tmp_path, name='11', content=None)
  (tmp_path / '12').write_text('a file')
  assert list(folders.StepFolders(tmp_path).finished()) == [9, 10]
  assert folders.StepFolders(tmp_path / 'absent').finished() == {}


def test_what_was_set_aside_counts_until_it_is_replaced(tmp_path: Path) -> None:
  steps = folders.StepFolders(tmp_path)
  _make(tmp_path, name='5', content='old')
  lock = steps.begin(5)
  assert (steps.finished()[5] / MANIFEST_NAME).read_text() == 'old'
  (steps.path(5) / MANIFEST_NAME).write_text('new')
  assert (steps.finished()[5] / MANIFEST_NAME).read_text() == 'new'
  lock.finish()
  steps.clean()
  assert [path.name for path in tmp_path.iterdir()] == ['5']
  assert [path.name for path in steps.path(5).iterdir()] == [MANIFEST_NAME]


def test_cleaning_puts_back_what_a_dead_writer_had_set_aside(tmp_path: Path) -> None:
  steps = folders.StepFolders(tmp_path)
  _make(tmp_path, name='5', content='old')
  steps.begin(5).abandon()
  steps.clean()
  assert (steps.path(5) / MANIFEST_NAME).read_text() == 'old'
  assert [path.name for path in tmp_path.iterdir()] == ['5']


def test_a_second_failed_replacement_keeps_what_was_set_aside(tmp_path: Path) -> None:
  steps = folders.StepFolders(tmp_path)
  _make(tmp_path, name='5', content='old')
  for _ in range(3):
    steps.begin(5).abandon()
    assert (steps.finished()[5] / MANIFEST_NAME).read_text() == 'old'


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
  steps = folders.StepFolders(tmp_path)
  lock = steps.begin(5)
  assert folders.is_being_written(steps.path(5))
  steps.clean()
  assert steps.path(5).exists()
  with pytest.raises(checkpoint.CheckpointError, match=r'5 is being written by process \d+ on'):
    steps.begin(5)
  lock.abandon()
  assert not folders.is_being_written(steps.path(5))
  steps.clean()
  assert not steps.path(5).exists()


def test_two_managers_do_not_disturb_each_other(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  gate = threading.Event()
  write_manifest = commit.write_manifest

  def first_is_slow(plan: commit.CommitPlan) -> None:
    assert plan.step != 1 or gate.wait(timeout=30)
    write_manifest(plan)

  monkeypatch.setattr(commit, 'write_manifest', first_is_slow)
  state = {'w': np.zeros(2)}
  slow, other = (checkpoint.CheckpointManager(tmp_path) for _ in range(2))
  slow.save(1, state)
  with pytest.raises(checkpoint.CheckpointError, match='is being written'):
    other.save(1, state)
  other.save(2, state)
  other.wait()
  assert other.steps() == [2]
  gate.set()
  slow.close()
  assert other.steps() == [1, 2]
  assert 'unfinished' not in caplog.text
