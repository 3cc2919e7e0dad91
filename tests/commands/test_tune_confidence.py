from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exitax.checkpoint import load_classifiers, write_classifiers
from exitax.errors import UserError
from tests.commands.conftest import RunCommand


@pytest.fixture
def model_dir(trained: Path, tmp_path: Path) -> Path:
  return shutil.copytree(trained, tmp_path / 'model')


def test_classifiers_are_trained_and_decoded_with(exitax: RunCommand, model_dir: Path):
  ask = ('generate', f'--model_dir={model_dir}', '--prompt=w1', '--json', '--max_new_tokens=4')
  ask = (*ask, '--threshold=0.5', '--confidence=classifier')
  missing = exitax(*ask)
  assert missing.status == 2
  assert 'confidence=classifier needs classifiers' in missing.err
  done = exitax(
    'tune-confidence',
    f'--model_dir={model_dir}',
    '--gin.ClassifierConfig.batches=2',
    '--gin.ClassifierConfig.held_out_batches=1',
    '--gin.ClassifierConfig.iterations=5',
  )
  assert (done.status, done.err) == (0, '')
  assert 'AUROC' in done.out
  text = exitax(*ask)
  assert (text.status, text.err) == (0, '')
  assert all(0 <= value <= 1 for value in json.loads(text.out)['confidences'])


def test_classifiers_of_other_weights_are_not_used(model_dir: Path):
  classifiers = {'1': {'kernel': [1.0, 2.0], 'bias': 0.5}}
  write_classifiers(model_dir, classifiers, step=4)
  assert load_classifiers(model_dir, step=8, exits=(1,)) is None
  found = load_classifiers(model_dir, step=4, exits=(1,))
  assert found is not None
  assert found['1']['kernel'].tolist() == [1.0, 2.0]
  assert found['1']['bias'] == 0.5
  assert load_classifiers(model_dir, step=4, exits=()) == {}
  assert load_classifiers(model_dir, step=4, exits=(1, 2)) is None


@pytest.mark.parametrize('kept', [-30, 10, 0])
def test_a_damaged_file_is_named(model_dir: Path, kept: int):
  path = write_classifiers(model_dir, {'1': {'kernel': [1.0]}}, step=8)
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(UserError, match=r'confidence.npz is damaged .* tune-confidence'):
    load_classifiers(model_dir, step=8, exits=(1,))


def test_only_those_who_ask_for_it_meet_a_damaged_file(exitax: RunCommand, model_dir: Path):
  (model_dir / 'confidence.npz').write_bytes(b'')
  ask = ('generate', f'--model_dir={model_dir}', '--prompt=w1', '--max_new_tokens=1')
  asked = exitax(*ask, '--threshold=0.5', '--confidence=classifier')
  assert asked.status == 2
  assert 'confidence.npz is damaged' in asked.err
  assert exitax(*ask, '--threshold=0.5').status == 0
