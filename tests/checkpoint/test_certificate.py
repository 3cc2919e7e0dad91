from __future__ import annotations

import dataclasses
import json

import pytest

from exitax.checkpoint import (
  CERTIFICATE_FILE,
  Certificate,
  checkpoint_digest,
  load_certificate,
  write_certificate,
)
from exitax.errors import UserError
from tests.checkpoint.certificates import make_certificate


@pytest.fixture
def model_dir(tmp_path):
  """Two finished steps; only their manifests matter here."""
  for step in (10, 20):
    folder = tmp_path / 'checkpoints' / str(step)
    folder.mkdir(parents=True)
    (folder / 'manifest.json').write_text(f'manifest of {step}')
  return tmp_path


def certificate(model_dir, *, step: int = 20) -> Certificate:
  digest = checkpoint_digest(model_dir, step=step)
  return make_certificate(checkpoint_step=step, checkpoint_digest=digest)


def test_it_comes_back_as_it_was_written(model_dir):
  made = certificate(model_dir)
  assert write_certificate(model_dir, made) == model_dir / CERTIFICATE_FILE
  assert load_certificate(model_dir, step=20, exits=(2, 4)) == made


def test_another_checkpoint_is_refused(model_dir):
  write_certificate(model_dir, certificate(model_dir))
  with pytest.raises(
    UserError, match=r'is for the checkpoint of step 20 .* is step 10 .*: calibrate'
  ):
    load_certificate(model_dir, step=10, exits=(2, 4))
  # The same step, trained again.
  (model_dir / 'checkpoints' / '20' / 'manifest.json').write_text('other weights')
  with pytest.raises(UserError, match='is for the checkpoint of step 20'):
    load_certificate(model_dir, step=20, exits=(2, 4))


@pytest.mark.parametrize('exits', [(2,), (), (2, 4, 5)])
def test_other_exits_are_refused(model_dir, exits):
  write_certificate(model_dir, certificate(model_dir))
  with pytest.raises(UserError, match=r'is for exits after layers 2,4, those in use are'):
    load_certificate(model_dir, step=20, exits=exits)


def test_no_certificate(model_dir):
  with pytest.raises(UserError, match='has no certificate: make one with `exitax calibrate'):
    load_certificate(model_dir, step=20, exits=(2, 4))
  with pytest.raises(UserError, match='holds no finished step 30'):
    checkpoint_digest(model_dir, step=30)


def test_a_changed_threshold_is_refused(model_dir):
  path = write_certificate(model_dir, certificate(model_dir))
  path.write_text(path.read_text().replace('"threshold": 0.7', '"threshold": 0.1'))
  with pytest.raises(UserError, match='was changed or damaged since it was written'):
    load_certificate(model_dir, step=20, exits=(2, 4))


@pytest.mark.parametrize('text', ['', '[]', '{"format": 9}', '{"format": 1}', '{'])
def test_damage(model_dir, text):
  (model_dir / CERTIFICATE_FILE).write_text(text)
  with pytest.raises(UserError, match=r'certificate\.json'):
    load_certificate(model_dir, step=20, exits=(2, 4))


def test_an_older_certificate_stays_when_writing_fails(model_dir):
  made = certificate(model_dir)
  write_certificate(model_dir, made)
  with pytest.raises(TypeError):
    write_certificate(model_dir, dataclasses.replace(made, settings={'bad': object()}))
  assert load_certificate(model_dir, step=20, exits=(2, 4)) == made
  assert json.loads((model_dir / CERTIFICATE_FILE).read_bytes())['format'] == 1


def test_what_it_speaks_of(model_dir):
  made = certificate(model_dir)
  made.check_use(max_new_tokens=64)
  made.check_use(
    max_new_tokens=64, decay=0.0
  )  # Settings that a certificate does not record are free.
  made.check_use(max_new_tokens=1, strategy='pipeline', measure='max_prob')
  for request, message in (
    ({'max_new_tokens': 65}, 'is for at most 64 new tokens; ask for fewer'),
    ({'max_new_tokens': 8, 'temperature': 0.5}, 'is for greedy decoding'),
    ({'max_new_tokens': 8, 'strategy': 'copy_state'}, 'is for deferred, recompute, pipeline'),
    ({'max_new_tokens': 8, 'measure': 'margin'}, 'is for max_prob; leave it out'),
  ):
    with pytest.raises(UserError, match=message):
      made.check_use(**request)
  with pytest.raises(UserError, match='is for copy_state;'):
    dataclasses.replace(made, strategy='copy_state').check_use(
      max_new_tokens=8, strategy='deferred'
    )
