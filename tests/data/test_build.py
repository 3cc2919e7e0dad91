from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from exitax import data
from exitax.data import corpus as corpus_file
from exitax.errors import UserError


@pytest.fixture
def config(tmp_path) -> data.DataConfig:
  rng = random.Random(0)
  for index in range(60):
    words = [f'w{rng.randrange(3000)}é' for _ in range(rng.randint(1, 60))]
    (tmp_path / 'text').mkdir(exist_ok=True)
    (tmp_path / 'text' / f'{index:02}.txt').write_text(' '.join(words))
  return data.DataConfig(
    mixture=data.Task(name='words', source=data.TextSource((str(tmp_path / 'text'),))),
    vocabulary=data.ByteVocabulary(),
    length=32,
    batch_size=4,
    split=data.SplitConfig(fraction=0.2),
    cache_dir=str(tmp_path / 'cache'),
  )


def _texts(batch_rows, tokenizer) -> list[str]:
  """The documents of rows in order, put together again from their inputs."""
  ids = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batch_rows])
  starts = np.flatnonzero(ids == tokenizer.bos_id)
  return [tokenizer.decode(part.tolist()) for part in np.split(ids, starts)[1:]]


def test_held_out_batches_are_the_held_out_documents(config):
  built = data.build_data(config)
  documents = data.read_documents(config.mixture.source)
  [split] = data.split_documents([documents], config=config.split)
  texts = _texts(list(built.eval_loader()), built.tokenizer)
  assert texts == [document.text for document in split.held_out]


def test_an_epoch_of_training_is_every_training_document(config):
  built = data.build_data(dataclasses.replace(config, batch_size=1))
  documents = data.read_documents(config.mixture.source)
  [split] = data.split_documents([documents], config=config.split)
  rows = -(-built.stats.train.tokens // 32)
  epoch = list(itertools.islice(built.train_loader(), rows))
  ids = np.sort(np.concatenate([b.tokens[b.segment_ids > 0] for b in epoch]))
  framed = [[256, *document.text.encode(), 257] for document in split.train]
  np.testing.assert_array_equal(ids, np.sort(np.concatenate(framed)))


@pytest.mark.parametrize('vocabulary', [data.ByteVocabulary(), data.BpeVocabulary(vocab_size=300)])
def test_weighted_targets_cover_exactly_the_bytes(config, vocabulary):
  built = data.build_data(dataclasses.replace(config, vocabulary=vocabulary))
  stats = built.stats.held_out
  batches = list(built.eval_loader())
  assert sum(batch.weights.sum() for batch in batches) == stats.targets
  targets = np.concatenate([batch.targets[batch.weights > 0] for batch in batches])
  texts = [
    built.tokenizer.decode(p)
    for p in np.split(targets, np.flatnonzero(targets == built.tokenizer.eos_id) + 1)
  ]
  assert sum(len(text.encode()) for text in texts) == stats.bytes
  assert stats.documents == (targets == built.tokenizer.eos_id).sum()
  assert stats.bytes_per_target == stats.bytes / stats.targets


def test_second_build_reads_the_cache(config, monkeypatch):
  config = dataclasses.replace(config, vocabulary=data.BpeVocabulary(vocab_size=300))
  first = data.build_data(config)

  def fail(*args, **kwargs):
    raise AssertionError('worked out again')

  monkeypatch.setattr(corpus_file, 'split_documents', fail)
  monkeypatch.setattr(data.BpeTokenizer, 'train', fail)
  monkeypatch.setattr(data.BpeTokenizer, 'encode_batch', fail)
  second = data.build_data(config)
  assert second.stats == first.stats and second.digest == first.digest
  assert second.tokenizer.digest == first.tokenizer.digest
  np.testing.assert_array_equal(
    next(second.train_loader()).tokens, next(first.train_loader()).tokens
  )


def test_digest_follows_text_split_and_tokenizer(config, tmp_path):
  digests = [data.build_data(config).digest]
  digests.append(
    data.build_data(dataclasses.replace(config, split=data.SplitConfig(fraction=0.3))).digest
  )
  bpe = dataclasses.replace(config, vocabulary=data.BpeVocabulary(vocab_size=300))
  digests.append(data.build_data(bpe).digest)
  (tmp_path / 'text' / 'new.txt').write_text('one more')
  changed = data.build_data(config)
  digests.append(changed.digest)
  assert len(set(digests)) == 4
  state = data.build_data(bpe).train_loader().get_state()
  with pytest.raises(UserError, match='belongs to other data'):
    changed.train_loader().set_state(state)


def test_tokenizer_of_a_checkpoint_takes_precedence(config, tmp_path):
  trained = data.build_data(
    dataclasses.replace(config, vocabulary=data.BpeVocabulary(vocab_size=300))
  )
  given = data.build_data(config, tokenizer=trained.tokenizer)
  assert given.digest == trained.digest
  trained.tokenizer.save(tmp_path / 'saved')
  saved = data.SavedVocabulary(path=str(tmp_path / 'saved'))
  assert data.build_data(dataclasses.replace(config, vocabulary=saved)).digest == trained.digest


def test_mixture_of_tasks(config, tmp_path):
  lines = [json.dumps({'text': f'line {i} {"xyz"[i % 3] * 9} q{i * i}'}) for i in range(40)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  other = data.Task(name='lines', source=data.JsonlSource((str(tmp_path / 'a.jsonl'),)))
  mixture = data.Mixture(
    name='both', tasks=(data.WeightedTask(config.mixture, 3), data.WeightedTask(other, 1))
  )
  built = data.build_data(dataclasses.replace(config, mixture=mixture))
  assert [task.name for task in built.stats.tasks] == ['words', 'lines']
  words, lines_stats = built.stats.tasks
  assert words.held_out.documents + words.train.documents + words.near_duplicates == 60
  assert built.stats.held_out.bytes == words.held_out.bytes + lines_stats.held_out.bytes
  only = _texts(list(built.eval_loader(task='lines')), built.tokenizer)
  assert len(only) == lines_stats.held_out.documents and all(t.startswith('line ') for t in only)
  both = _texts(list(built.eval_loader()), built.tokenizer)
  assert both[-len(only) :] == only and len(both) == built.stats.held_out.documents
  assert json.loads(json.dumps(built.stats.summary()))['tasks'][1]['name'] == 'lines'
  with pytest.raises(UserError, match=r"no task 'word' .*choose one of words, lines"):
    built.eval_loader(task='word')


def test_default_corpus_in_small(tmp_path):
  task = data.Task(name='some', source=data.PythonLibrarySource(max_files=60))
  built = data.build_data(
    data.DataConfig(
      mixture=task, vocabulary=data.BpeVocabulary(vocab_size=1024), cache_dir=str(tmp_path)
    )
  )
  assert built.tokenizer.vocab_size == 1024
  assert 2.4 < built.stats.train.bytes_per_target < 4
  assert next(built.train_loader()).tokens.shape == (8, 256)


def test_bad_input(config, tmp_path):
  with pytest.raises(UserError, match="unknown task or mixture 'nothing'"):
    data.build_data(dataclasses.replace(config, mixture='nothing'))
  (tmp_path / 'text' / '00.txt').write_bytes(b'\xff\xff')
  with pytest.raises(UserError, match=r'00\.txt is not UTF-8 text'):
    data.build_data(config)
  none = dataclasses.replace(config, split=data.SplitConfig(fraction=0))
  (tmp_path / 'text' / '00.txt').write_text('mended')
  with pytest.raises(UserError, match='no held-out text'):
    data.build_data(none).eval_loader()


def test_import_needs_jax_and_numpy_alone(subprocess_env):
  heavy = ['tokenizers', 'grain', 'tensorflow_datasets', 'rich', 'tqdm', 'flax', 'gin', 'orbax']
  program = f"""
import sys
sys.modules.update(dict.fromkeys({heavy!r}))
from exitax import data
assert data.ByteTokenizer().encode('a') == [97]
"""
  subprocess.run([sys.executable, '-c', program], env=subprocess_env, check=True)
