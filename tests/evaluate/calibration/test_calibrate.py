from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from exitax import data, decode
from exitax.errors import UserError
from exitax.evaluate.calibration import (
  CalibrateConfig,
  calibrate,
  file_examples,
  held_out_examples,
  make_certificate,
  render_calibration,
  write_calibration,
)
from exitax.evaluate.calibration.picture import draw_calibration
from tests.evaluate.conftest import make_loaded

SMALL = CalibrateConfig(
  examples=9, prompt_tokens=6, max_new_tokens=8, batch_size=4, thresholds=(0.9, 0.5, 0.2, 0.0)
)
LENIENT = {'risk': 0.9, 'confidence': 0.6}


@pytest.fixture(scope='module')
def examples(corpus):
  return held_out_examples(corpus, SMALL)


def test_windows_are_stretches_of_held_out_documents(corpus, examples):
  (task,) = corpus.corpus.tasks
  stream = task.held_out
  start = data.start_id(corpus.tokenizer)
  assert len(examples) == 9
  assert len(set(examples.texts)) == 9
  for prompt, text in zip(examples.prompts, examples.texts, strict=True):
    assert len(text) == 14
    assert prompt == text[:6]
    assert text[0] == start
    assert bytes(text[1:]) in bytes(
      np.where(stream.tokens < 256, stream.tokens, 0).astype(np.uint8)
    )
  assert f'{examples.available} windows of 14 tokens' in examples.population


def test_documents_give_one_window_each(corpus):
  config = dataclasses.replace(SMALL, draw='documents', examples=99)
  drawn = held_out_examples(corpus, config)
  (task,) = corpus.corpus.tasks
  assert len(drawn) == drawn.available == len(task.held_out.offsets) - 1
  beginnings = [
    task.held_out.tokens[begin : begin + 14].tolist() for begin in task.held_out.offsets[:-1]
  ]
  assert [list(text) for text in drawn.texts] == beginnings


def test_the_draw_is_by_chance_and_repeatable(corpus, examples):
  again = held_out_examples(corpus, SMALL)
  other = held_out_examples(corpus, dataclasses.replace(SMALL, seed=1))
  assert again.digest == examples.digest != other.digest
  # A larger draw holds the smaller one.
  more = held_out_examples(corpus, dataclasses.replace(SMALL, examples=15))
  assert set(examples.texts) < set(more.texts)


def test_too_long_windows_are_refused(corpus):
  with pytest.raises(UserError, match='longer than every held-out document: lower one of them'):
    held_out_examples(corpus, dataclasses.replace(SMALL, prompt_tokens=400))


def test_losses_are_those_of_generate(loaded, examples, one_device):
  report = calibrate(loaded, examples, dataclasses.replace(SMALL, **LENIENT), mesh=one_device)

  def outputs(threshold):
    return decode.generate(
      loaded.model,
      loaded.params,
      examples.prompts,
      max_new_tokens=8,
      policy=decode.DeferredExit(threshold=threshold),
      stop_tokens=(loaded.tokenizer.eos_id,),
    ).tokens

  full = outputs(1.0)
  for row in report.decision.rows:
    ours = outputs(row.threshold)
    shares = [
      1 - np.mean([a == b for a, b in zip(x, y, strict=False)] + [False] * abs(len(x) - len(y)))
      for x, y in zip(ours, full, strict=True)
    ]
    assert row.risk == pytest.approx(np.mean(shares))
  assert report.layers[0] == 3
  assert report.decision.rows[0].risk == 0
  assert len({row.risk for row in report.decision.rows}) > 2


def test_it_stops_decoding_after_failures(loaded, examples, one_device):
  config = dataclasses.replace(SMALL, thresholds=tuple(np.linspace(0.95, 0, 20)))
  labels = []

  def progress(items, *, total, label):
    labels.append(label)
    return iter(items)

  report = calibrate(loaded, examples, config, mesh=one_device, progress=progress)
  assert report.decision.threshold is None  # 9 examples cannot bound a risk by 0.02.
  assert len(report.decision.rows) == len(report.layers) == len(labels) == 4
  assert 'Not certified' in render_calibration(report)
  with pytest.raises(ValueError, match='nothing was certified'):
    make_certificate(report, checkpoint_digest='abc')


@pytest.mark.parametrize('metric', ['rouge', 'exact_match', 'bits_per_byte', 'token_agreement'])
@pytest.mark.parametrize('method', ['ltt', 'crc'])
def test_every_metric_and_method(loaded, examples, one_device, metric, method):
  config = dataclasses.replace(SMALL, metric=metric, method=method, **LENIENT)
  report = calibrate(loaded, examples, config, mesh=one_device)
  rows = report.decision.rows
  assert rows[0].risk == 0
  assert all(0 <= row.risk <= row.bound <= 1 for row in rows)
  assert report.decision.threshold in (0.9, 0.5, 0.2, 0.0)
  certificate = make_certificate(report, checkpoint_digest='abc')
  assert certificate.threshold == report.decision.threshold
  assert certificate.confidence == (0.6 if method == 'ltt' else None)
  assert certificate.statement.startswith(
    f'threshold {certificate.threshold:g} on max_prob: expected'
  )
  assert ('not with high probability' in certificate.statement) == (method == 'crc')


def test_forced_agreement_is_gentler_than_free(loaded, examples, one_device):
  free = calibrate(loaded, examples, dataclasses.replace(SMALL, **LENIENT), mesh=one_device)
  config = dataclasses.replace(SMALL, forcing='forced', **LENIENT)
  forced = calibrate(loaded, examples, config, mesh=one_device)
  assert forced.decision.rows[0].risk == 0
  assert forced.decision.rows[-1].risk < free.decision.rows[-1].risk
  # Where nothing differs freely nothing differs along the text.
  for ours, theirs in zip(forced.decision.rows, free.decision.rows, strict=False):
    assert theirs.risk > 0 or ours.risk == 0


@pytest.mark.parametrize('strategy', ['deferred', 'recompute'])
def test_exact_strategies_agree(loaded, examples, one_device, strategy):
  config = dataclasses.replace(SMALL, strategy=strategy, **LENIENT)
  report = calibrate(loaded, examples, config, mesh=one_device)
  expected = calibrate(loaded, examples, dataclasses.replace(SMALL, **LENIENT), mesh=one_device)
  assert report.decision == expected.decision


def test_files(loaded, examples, one_device, tmp_path):
  report = calibrate(loaded, examples, dataclasses.replace(SMALL, **LENIENT), mesh=one_device)
  picture, table = write_calibration(report, tmp_path / 'calibration')
  assert picture.read_bytes().startswith(b'\x89PNG')
  content = json.loads(table.read_bytes())
  assert content['decision']['threshold'] == report.decision.threshold
  assert content['config']['metric'] == 'token_agreement'
  assert content['statement'] == report.statement
  low = tuple(dataclasses.replace(row, risk=0.01, bound=0.02) for row in report.decision.rows)
  decision = dataclasses.replace(report.decision, rows=low)
  figure = draw_calibration(dataclasses.replace(report, decision=decision))
  assert figure.axes[0].get_ylim()[1] > report.config.risk  # The limit is in the picture.


def test_a_model_without_exits_is_refused(corpus, one_device, examples):
  plain = make_loaded(corpus.tokenizer, one_device, exits=())
  with pytest.raises(UserError, match='has no exits: there is no threshold to calibrate'):
    calibrate(plain, examples, SMALL, mesh=one_device)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'metric': 'bleu'}, "metric='bleu' is not known: choose 'token_agreement', 'rouge'"),
    ({'method': 'magic'}, "method='magic' is not known: choose 'ltt', 'crc'"),
    ({'measure': 'luck'}, "measure='luck' is not known: choose 'max_prob'"),
    ({'risk': 0.0}, r'risk=0.0 is outside \(0, 1\): choose such as 0.02'),
    ({'risk': 2}, r'risk=2 is outside \(0, 1\)'),
    ({'confidence': 1.0}, r'confidence=1.0 is outside \(0, 1\): choose such as 0.95'),
    ({'measure': 'classifier'}, 'measure=classifier cannot be certified'),
    ({'examples': 0}, 'examples=0 must be at least 1'),
    ({'thresholds': (1.5,)}, r'threshold=1.5 is outside \[0, 1\]'),
    ({'thresholds': (1.0,)}, 'never exit: give some below 1'),
    ({'forcing': 'forced', 'metric': 'rouge'}, "forcing='forced' is for metric=token_agreement"),
    (
      {'metric': 'bits_per_byte', 'measure': 'cosine'},
      'measure=cosine is known only while decoding',
    ),
    ({'metric': 'bits_per_byte', 'strategy': 'copy_state'}, 'choose strategy=deferred'),
  ],
)
def test_settings_out_of_range(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
  ('strategy', 'message'),
  [
    ('fast', "strategy='fast' is not known: choose 'full', 'deferred'"),
    ('speculative', 'nothing to certify'),
    ('pipeline', 'calibrate with strategy=deferred'),
  ],
)
def test_strategies_without_a_threshold(strategy, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SMALL, strategy=strategy)


# Prompts of a user's own.


def read(path, tokenizer, **changes):
  config = dataclasses.replace(SMALL, **changes)
  return file_examples(str(path), tokenizer, config, max_length=64)


def test_prompt_files(tmp_path, corpus):
  tokenizer = corpus.tokenizer
  lines = tmp_path / 'prompts.txt'
  lines.write_text('tea\n\nsalt moss\n')
  drawn = read(lines, tokenizer)
  assert [tokenizer.decode(prompt) for prompt in drawn.prompts] == ['tea', 'salt moss']
  assert drawn.population == '2 prompts of prompts.txt'
  json_lines = tmp_path / 'prompts.jsonl'
  json_lines.write_text('{"prompt": "tea"}\n{"text": "salt moss", "id": 3}\n')
  assert read(json_lines, tokenizer).prompts == drawn.prompts
  assert len(read(json_lines, tokenizer, examples=1)) == 1
  json_lines.write_text('{"prompt": "a\u2028b\x85"}\n{"prompt": "c"}\n', encoding='utf-8')
  assert [tokenizer.decode(prompt) for prompt in read(json_lines, tokenizer).prompts] == [
    'a\u2028b\x85',
    'c',
  ]


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('absent.txt', None, 'cannot be read'),
    ('empty.txt', '\n', 'has no prompt: write one a line'),
    ('long.txt', 'x' * 70, 'long.txt:1 has 71 tokens, the context of 64 leaves 56: shorten it'),
    ('bad.jsonl', '{"prompt": "a"}\n{', 'bad.jsonl:2 is not JSON'),
    ('field.jsonl', '{"question": "a"}', "field.jsonl:1 has no text in 'prompt' or 'text'"),
    ('list.jsonl', '[1]', 'list.jsonl:1 has no text'),
    ('deep.jsonl', '[' * 100_000, 'deep.jsonl:1 is not JSON'),
    ('half.jsonl', '{"prompt": "a"}\n{"prompt": "\\ud800"}', 'half.jsonl:2: text has .* at 0'),
    ('void.jsonl', '{"prompt": ""}', 'void.jsonl:1 has no text: remove the line'),
  ],
)
def test_bad_prompt_files(tmp_path, corpus, name, content, message):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=message):
    read(tmp_path / name, corpus.tokenizer)
