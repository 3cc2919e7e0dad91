from __future__ import annotations

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from exitax import data
from exitax.errors import UserError

TEXTS = {'train': ['first text', 'zweiter Täxt', 'third\nlines'], 'test': ['held']}


class SmallText(tfds.core.GeneratorBasedBuilder):
  """Four texts, written as array_record by the real machinery."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = None

  def _info(self):
    features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'year': np.int64})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {name: self._examples(texts) for name, texts in TEXTS.items()}

  def _examples(self, texts):
    for index, text in enumerate(texts):
      yield index, {'text': text, 'year': index}

  def _generate_examples(self):
    raise NotImplementedError


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> str:
  folder = str(tmp_path_factory.mktemp('tfds'))
  SmallText(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def test_reads_what_tfds_wrote_without_tensorflow(data_dir, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)  # Importing it now fails.
  source = data.TfdsSource('small_text', data_dir=data_dir)
  documents = list(source.documents())
  assert sorted(d.text for d in documents) == sorted(TEXTS['train'])
  assert documents == list(source.documents())
  assert documents[0].name == 'small_text/train:0'
  test = data.TfdsSource('small_text', data_dir=data_dir, split='test')
  assert [d.text for d in test.documents()] == TEXTS['test']
  half = data.TfdsSource('small_text', data_dir=data_dir, split='train[:2]')
  assert list(half.documents()) != documents and len(list(half.documents())) == 2


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'name': 'no_such_data'}, "cannot open TFDS data set 'no_such_data'"),
    ({'split': 'dev'}, r"cannot read split 'dev' .*\(splits: .*train"),
    ({'field': 'body'}, r"no feature 'body' \(features: 'text', 'year'\)"),
    ({'field': 'year'}, "feature 'year' is .*, need text"),
  ],
)
def test_bad_input(data_dir, settings, message):
  source = data.TfdsSource(**{'name': 'small_text', 'data_dir': data_dir, **settings})
  with pytest.raises(UserError, match=message):
    list(source.documents())


def test_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(UserError, match=r'pip install "exitax\[tfds\]"'):
    list(data.TfdsSource('small_text').documents())
