"""The model that lm-evaluation-harness sees, against its own model of transformers and plain computations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from exitax.checkpoint import LoadedModel
from exitax.data import ByteTokenizer, quiet
from exitax.decode import Confidence, FullDepth, Sampler, generate
from exitax.errors import UserError
from exitax.evaluate.harness import (
  FirstConfident,
  FixedDepth,
  Row,
  Scorer,
  TextRequest,
  TextWriter,
  make_rows,
)
from exitax.evaluate.harness.scoring import bucket_length
from exitax.models import logits_at_exits
from exitax.parallel import ShardingRules
from tests.convert.conftest import VOCAB, make_config, randomised, write_tokenizer
from tests.evaluate.conftest import make_loaded

WHY = 'needs the harness extra: make install-dev'
pytest.importorskip('lm_eval', reason=WHY)

from lm_eval.api.instance import Instance  # noqa: E402  (after it is known to be there)

from exitax.evaluate.harness.adapter import ExitaxLM  # noqa: E402

RULES = ShardingRules()
LENGTH = 64  # Of the tiny model's context.


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
  return [
    Instance(request_type=kind, doc={}, arguments=item, idx=i, metadata=('made_up', i, 1))
    for i, item in enumerate(arguments)
  ]


def make_lm(loaded: LoadedModel, row: Row, mesh: jax.sharding.Mesh, **changes: Any) -> ExitaxLM:
  shared = {'mesh': mesh, 'rules': RULES, 'batch_size': 4}
  measure = getattr(row, 'measure', Confidence.MAX_PROB)
  scorer = Scorer(loaded, [row], measure=measure, **shared)
  return ExitaxLM(loaded, row, scorer=scorer, writer=TextWriter(loaded, **shared), **changes)


def row_of(loaded: LoadedModel, name: str) -> Row:
  (row,) = make_rows(loaded.model.config, exits=name)
  return row


@pytest.fixture(scope='module')
def byte_model(one_device: jax.sharding.Mesh) -> LoadedModel:
  return make_loaded(ByteTokenizer(), one_device)


# Against HFLM.

_CHARACTERS = [chr(code) for code in range(0x21, 0x21 + VOCAB - 3)]


def words(rng: np.random.Generator, length: int) -> str:
  return ''.join(rng.choice(_CHARACTERS, size=length))


@dataclasses.dataclass
class Pair:
  """The same weights as lm_eval's model of transformers, and as ours."""

  theirs: Any
  ours: ExitaxLM


@pytest.fixture(scope='module', params=['start', 'no_start'])
def pair(request, tmp_path_factory, one_device: jax.sharding.Mesh) -> Pair:
  """A random Llama, whose tokenizer begins prompts with <s>, or does not."""
  torch = pytest.importorskip('torch', reason=WHY)
  pytest.importorskip('accelerate', reason='needs the bench extra: make install-dev')
  from lm_eval.models.huggingface import HFLM

  from exitax.convert import load_huggingface, open_source

  folder: Path = tmp_path_factory.mktemp('llama')
  model = randomised(make_config('llama'))
  # Enlarged, so that greedy texts do not hang on a rounding.
  with torch.no_grad():
    model.lm_head.weight.mul_(5.0)
  model.save_pretrained(folder)
  write_tokenizer(folder, template=request.param == 'start')
  loaded = load_huggingface(open_source(folder), mesh=one_device, rules=RULES)
  theirs = HFLM(pretrained=str(folder), device='cpu', dtype='float32', batch_size=3)
  assert theirs.max_length == loaded.model.config.max_length
  return Pair(theirs=theirs, ours=make_lm(loaded, row_of(loaded, 'final'), one_device))


def test_scores_are_those_of_hflm(pair: Pair):
  rng = np.random.default_rng(0)
  lengths = [(1, 1), (5, 3), (70, 2), (100, 27), (100, 29), (200, 5), (40, 128), (3, 60), (9, 1)]
  arguments = [(words(rng, a), words(rng, b)) for a, b in lengths]
  # Nothing before, the same text twice, a start that is there already, and unknown characters.
  arguments += [('', words(rng, 6)), arguments[1], ('<s>AB', 'CD'), ('', '<s>AB'), ('A  ', 'B')]
  requests = instances('loglikelihood', *arguments)
  expected = pair.theirs.loglikelihood(requests, disable_tqdm=True)
  found = pair.ours.loglikelihood(requests)
  np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=1e-4, atol=1e-4)
  assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_flags_are_those_of_hflm(pair: Pair):
  """Continuations that the model itself writes are greedy; with one token changed they are not."""
  rng = np.random.default_rng(1)
  contexts = [words(rng, length) for length in (3, 17, 60)]
  settings = {'until': [], 'max_gen_toks': 5}
  texts = pair.theirs.generate_until(
    instances('generate_until', *((context, settings) for context in contexts)), disable_tqdm=True
  )
  arguments = [item for item in zip(contexts, texts, strict=True) if item[1]]
  assert arguments
  arguments += [(context, text[:-1] + chr(ord(text[-1]) ^ 1)) for context, text in arguments]
  requests = instances('loglikelihood', *arguments)
  expected = [greedy for _, greedy in pair.theirs.loglikelihood(requests, disable_tqdm=True)]
  assert set(expected) == {True, False}
  assert [greedy for _, greedy in pair.ours.loglikelihood(requests)] == expected


def test_rolling_scores_are_those_of_hflm(pair: Pair):
  rng = np.random.default_rng(2)
  texts = [words(rng, length) for length in (1, 50, 127, 128, 129, 300)]
  requests = instances('loglikelihood_rolling', *((text,) for text in texts))
  expected = pair.theirs.loglikelihood_rolling(requests, disable_tqdm=True)
  np.testing.assert_allclose(
    pair.ours.loglikelihood_rolling(requests), expected, rtol=1e-4, atol=1e-4
  )


def test_texts_are_those_of_hflm(pair: Pair):
  rng = np.random.default_rng(3)
  contexts = [words(rng, length) for length in (4, 30, 31, 90, 150)]
  settings = {'until': [], 'max_gen_toks': 20, 'do_sample': False, 'temperature': 0.0}
  requests = instances('generate_until', *((context, settings) for context in contexts))
  expected = pair.theirs.generate_until(requests, disable_tqdm=True)
  assert pair.ours.generate_until(requests) == expected
  # Stop strings out of what was written: one token, and two.
  stops = [expected[0][3:4], expected[1][5:7], expected[2][9:11]]
  settings = {'until': [stop for stop in stops if stop], 'max_gen_toks': 20}
  requests = instances('generate_until', *((context, settings) for context in contexts))
  stopped = pair.theirs.generate_until(requests, disable_tqdm=True)
  assert stopped != expected
  assert pair.ours.generate_until(requests) == stopped


# Exits against plain computations.


_logits_at_exits = jax.jit(logits_at_exits, static_argnums=0)


def logits_of(loaded: LoadedModel, ids: list[int]) -> np.ndarray:
  """Scores `[exits + 1, len(ids), vocab]` of one text, padded so that one program serves all."""
  row = np.zeros((3, 1, LENGTH), np.int32)
  row[0, 0, : len(ids)] = ids
  row[1, 0, : len(ids)] = 1
  row[2, 0] = np.arange(LENGTH)
  return np.asarray(_logits_at_exits(loaded.model, loaded.params, *row))[:, 0, : len(ids)]


def plain_scores(
  loaded: LoadedModel, context: str, continuation: str
) -> tuple[np.ndarray, np.ndarray]:
  """Log-probabilities of the continuation's bytes at every exit, and its scores `[exits, n, vocab]`."""
  ids = [ByteTokenizer.bos_id, *context.encode(), *continuation.encode()]
  ids = ids[-(LENGTH + 1) :]
  logits = logits_of(loaded, ids[:-1])
  count = len(continuation.encode())
  log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)[:, -count:]
  targets = np.asarray(ids[-count:])
  return log_probs[:, np.arange(count), targets], log_probs


TEXTS = (('tea and ', 'salt'), ('', 'moss'), ('x' * 80, 'elm'), ('fog', ' over the oak ' * 3))


@pytest.mark.parametrize(('name', 'index'), [('1', 0), ('exit_2', 1), ('final', 2)])
def test_an_exit_scores_as_its_logits_say(byte_model, one_device, name: str, index: int):
  lm = make_lm(byte_model, row_of(byte_model, name), one_device)
  # The base class moves spaces at the end of a context into the continuation.
  found = lm.loglikelihood(instances('loglikelihood', *TEXTS))
  for (context, continuation), (score, greedy) in zip(TEXTS, found, strict=True):
    spaces = len(context) - len(context.rstrip())
    moved = context[len(context) - spaces :] + continuation
    targets, scores = plain_scores(byte_model, context[: len(context) - spaces], moved)
    np.testing.assert_allclose(score, targets[index].sum(), rtol=1e-4)
    assert greedy == bool(np.all(scores[index].max(axis=-1) == targets[index]))
  layer = byte_model.model.config.depths[index]
  assert lm.meter.mean == layer


@pytest.mark.parametrize('measure', ['max_prob', 'margin'])
def test_thresholds_score_tokens_at_their_first_confident_exit(byte_model, one_device, measure):
  row = FirstConfident(threshold=0.3, measure=Confidence(measure))
  lm = make_lm(byte_model, row, one_device)
  context, continuation = 'the oak is', ' fog, the fog an elm; moss'
  ((score, _),) = lm.loglikelihood(instances('loglikelihood', (context, continuation)))
  targets, scores = plain_scores(byte_model, context, continuation)
  best = np.sort(np.exp(scores), axis=-1)
  sure = best[..., -1] - (best[..., -2] if measure == 'margin' else 0.0)
  expected, layers = 0.0, []
  for token in range(targets.shape[1]):
    exit_index = next((i for i in range(2) if sure[i, token] > 0.3), 2)
    expected += targets[exit_index, token]
    layers.append(byte_model.model.config.depths[exit_index])
  assert len(set(layers)) > 1, 'a threshold that treats all tokens alike shows nothing'
  np.testing.assert_allclose(score, expected, rtol=1e-4)
  np.testing.assert_allclose(lm.meter.mean, np.mean(layers))


@pytest.mark.parametrize(('threshold', 'name'), [(1.0, 'final'), (0.0, '1')])
def test_the_ends_of_the_thresholds_are_fixed_depths(byte_model, one_device, threshold, name):
  by_threshold = make_lm(byte_model, FirstConfident(threshold=threshold), one_device)
  fixed = make_lm(byte_model, row_of(byte_model, name), one_device)
  requests = instances('loglikelihood', *TEXTS)
  np.testing.assert_allclose(
    [score for score, _ in by_threshold.loglikelihood(requests)],
    [score for score, _ in fixed.loglikelihood(requests)],
    rtol=1e-6,
  )
  requests = instances('loglikelihood_rolling', ('fog and moss ' * 9,))
  np.testing.assert_allclose(
    by_threshold.loglikelihood_rolling(requests), fixed.loglikelihood_rolling(requests), rtol=1e-6
  )
  settings = {'until': [], 'max_gen_toks': 12}
  requests = instances('generate_until', ('tea', settings), ('salt and', settings))
  assert by_threshold.generate_until(requests) == fixed.generate_until(requests)
  assert by_threshold.meter.mean == fixed.meter.mean


@pytest.mark.parametrize(('name', 'index'), [('1', 0), ('2', 1)])
def test_an_exit_writes_what_its_logits_say(byte_model, one_device, name: str, index: int):
  lm = make_lm(byte_model, row_of(byte_model, name), one_device)
  settings = {'until': [], 'max_gen_toks': 6}
  (text,) = lm.generate_until(instances('generate_until', ('moss', settings)))
  ids = [ByteTokenizer.bos_id, *b'moss']
  for _ in range(6):
    ids.append(int(np.argmax(logits_of(byte_model, ids)[index, -1])))
    if ids[-1] == ByteTokenizer.eos_id:
      break
  assert text == ByteTokenizer().decode(ids[5:])


def test_speculation_writes_the_final_layers_texts(byte_model, one_device):
  settings = {'until': [], 'max_gen_toks': 16}
  requests = instances('generate_until', ('elm', settings), ('oak and fog', settings))
  texts = []
  for strategy in ('full', 'speculative'):
    (row,) = make_rows(byte_model.model.config, exits='final', strategy=strategy)
    texts.append(make_lm(byte_model, row, one_device).generate_until(requests))
  assert texts[0] == texts[1]


# Texts.


def test_settings_of_generation_are_honoured(byte_model, one_device):
  lm = make_lm(byte_model, row_of(byte_model, 'final'), one_device)
  settings = {'until': 'zz', 'max_new_tokens': 9, 'do_sample': True, 'temperature': 3, 'top_k': 40}
  requests = instances('generate_until', *[('tea', settings)] * 3)
  texts = lm.generate_until(requests)
  assert len(set(texts)) > 1, 'repeats of a sampled request differ'
  assert texts == lm.generate_until(requests), 'and come again'
  prompt = [ByteTokenizer.bos_id, *b'tea']
  expected = generate(
    byte_model.model,
    byte_model.params,
    [prompt] * 3,
    max_new_tokens=9,
    policy=FullDepth(),
    sampler=Sampler(temperature=3.0, top_k=40),
    stop_tokens=[ByteTokenizer.eos_id],
    seed=[0, 1, 2],
  )
  assert texts == [ByteTokenizer().decode(tokens).split('zz')[0] for tokens in expected.tokens]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'max_gen_toks': 64}, 'made_up asks for max_gen_toks=64, and the context is 64'),
    ({'max_gen_toks': 4, 'num_beams': 5}, 'made_up generates with num_beams=5'),
  ],
)
def test_what_cannot_be_generated_is_refused(byte_model, one_device, settings, message):
  lm = make_lm(byte_model, row_of(byte_model, 'final'), one_device)
  with pytest.raises(UserError, match=message):
    lm.generate_until(instances('generate_until', ('tea', {'until': [], **settings})))


def test_texts_end_before_stop_strings_and_keep_their_order(byte_model, one_device):
  writer = TextWriter(byte_model, mesh=one_device, rules=RULES, batch_size=2)
  prompts = [b'a', b'bc', b'def', b'moss and fog', b'x']
  plain = [TextRequest(prompt=(256, *prompt), max_new_tokens=40) for prompt in prompts]
  whole = writer(plain, policy=FullDepth())
  stops = tuple(text.text[4:6] for text in whole if len(text.text) > 6)
  assert stops
  cut = writer([dataclasses.replace(item, stops=stops) for item in plain], policy=FullDepth())
  for before, after in zip(whole, cut, strict=True):
    ends = [at for stop in stops if (at := before.text.find(stop)) >= 0]
    assert after.text == before.text[: min(ends, default=None)]
    assert len(after.exit_layers) <= len(before.exit_layers)


def test_a_continuation_that_does_not_fit_is_refused(byte_model, one_device):
  lm = make_lm(byte_model, row_of(byte_model, 'final'), one_device)
  with pytest.raises(UserError, match='continuation of 65 tokens exceeds the context of 64'):
    lm.loglikelihood(instances('loglikelihood', ('tea', 'x' * 65)))
  ((score, _),) = lm.loglikelihood(instances('loglikelihood', ('tea', 'x' * 64)))
  assert score < 0


def test_an_empty_continuation_is_certain(byte_model, one_device):
  lm = make_lm(byte_model, row_of(byte_model, 'final'), one_device)
  assert lm.loglikelihood(instances('loglikelihood', ('tea', ''))) == [(0.0, True)]
  assert lm.loglikelihood_rolling(instances('loglikelihood_rolling', ('',)))[0] <= 0


# What is shared.


def test_given_texts_are_scored_once_for_all_rows(byte_model, one_device):
  calls = []

  def counted(items, *, total, label):
    calls.append(label)
    return quiet(items, total=total, label=label)

  rows = make_rows(byte_model.model.config, thresholds=(0.5,))
  shared = {'mesh': one_device, 'rules': RULES, 'batch_size': 4}
  scorer = Scorer(byte_model, rows, progress=counted, **shared)
  writer = TextWriter(byte_model, **shared)
  requests = instances('loglikelihood', *TEXTS, TEXTS[0])
  answers = []
  for row in rows:
    answers.append(ExitaxLM(byte_model, row, scorer=scorer, writer=writer).loglikelihood(requests))
  assert calls == ['scoring 4 texts']
  assert answers[0][0] == answers[0][-1]
  assert len({answer[0][0] for answer in answers[:3]}) == 3, 'exits differ'


def test_exits_that_no_row_reads_are_not_scored(byte_model, one_device):
  scorer = Scorer(byte_model, [row_of(byte_model, '2')], mesh=one_device, rules=RULES, batch_size=2)
  assert scorer.depths == (2, 3)


def test_buckets_are_few(byte_model):
  config = dataclasses.replace(byte_model.model.config, max_length=1000)
  lengths = [bucket_length(config, n) for n in range(1, 1001)]
  assert sorted(set(lengths)) == [64, 128, 256, 512, 1000]
  assert all(length >= n for n, length in enumerate(lengths, start=1))


# Rows.


def test_rows_by_name(byte_model):
  config = byte_model.model.config
  rows = make_rows(config, thresholds=(0.5, 0.9))
  assert [row.name for row in rows] == ['exit_1', 'exit_2', 'final', 'max_prob>0.9', 'max_prob>0.5']
  assert [row.layer for row in rows if isinstance(row, FixedDepth)] == [1, 2, 3]
  assert [row.name for row in make_rows(config, exits='final, 2')] == ['exit_2', 'final']
  assert [row.name for row in make_rows(config, exits='3')] == ['final']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'exits': '7'}, "exits=7: '7' is no exit of this model: choose all, or 1, 2, final"),
    ({'exits': ''}, 'is no exit'),
    ({'thresholds': (1.5,)}, r'threshold=1.5 is outside \[0, 1\]'),
    ({'confidence': 'cosine'}, 'choose max_prob, margin, entropy'),
    ({'confidence': 'mood'}, "confidence='mood' is not known"),
    ({'strategy': 'deferred'}, 'choose full or speculative'),
  ],
)
def test_wrong_rows_are_refused(byte_model, changes, message):
  with pytest.raises(UserError, match=message):
    make_rows(byte_model.model.config, **changes)


def test_a_model_without_exits_has_one_row(byte_model):
  config = dataclasses.replace(byte_model.model.config, exits=())
  assert [row.name for row in make_rows(config)] == ['final']
  with pytest.raises(UserError, match=r'thresholds=0.9 need exits'):
    make_rows(config, thresholds=(0.9,))
  with pytest.raises(UserError, match='speculative needs exits'):
    make_rows(config, strategy='speculative')


# Chat.


def test_questions_are_put_as_a_chat_where_a_template_is_given(byte_model, one_device):
  row = row_of(byte_model, 'final')
  lm = make_lm(byte_model, row, one_device, chat=lambda messages: messages[0]['content'] + '!')
  assert lm.apply_chat_template([{'role': 'user', 'content': 'tea'}]) == 'tea!'
  assert lm.tokenizer_name == ByteTokenizer.digest
  with pytest.raises(UserError, match='gen_prefix'):
    lm.apply_chat_template([{'role': 'user', 'content': 'tea'}], add_generation_prompt=False)
  with pytest.raises(UserError, match='no chat template'):
    make_lm(byte_model, row, one_device).apply_chat_template([])
