from __future__ import annotations

import dataclasses

import jax
import pytest

from exitax import data, evaluate
from exitax.errors import UserError
from exitax.models import ExitConfig
from exitax.objectives import add_sums, exit_scores, make_score_fn
from exitax.parallel import MeshConfig, make_mesh
from tests.evaluate.conftest import make_loaded

CONFIG = evaluate.EvaluateConfig(
  rows=6,
  confidence=('margin', 'max_prob'),
  thresholds=(0.0, 0.3, 1.0),
  speed_prompts=2,
  speed_prompt_tokens=6,
  speed_new_tokens=6,
  speed_repeats=1,
)
UNTIMED = dataclasses.replace(CONFIG, speed_prompts=0)


@pytest.fixture(scope='module')
def report(loaded, corpus):
  return evaluate.evaluate(loaded, corpus, CONFIG)


def test_exits_are_scored_as_training_scores_them(report, loaded, corpus):
  score = jax.jit(make_score_fn(loaded.model))
  sums = add_sums(score(loaded.params, batch) for batch in corpus.eval_loader(max_rows=6))
  per_target = corpus.stats.held_out.bytes_per_target
  expected = exit_scores(loaded.model, sums, bytes_per_token=per_target)
  for ours, theirs in zip(report.exits, expected, strict=True):
    assert (ours.name, ours.layer) == (theirs.name, theirs.layer)
    assert ours.nll == pytest.approx(theirs.nll, rel=1e-5)
    assert ours.bits_per_byte == pytest.approx(theirs.bits_per_byte, rel=1e-5)
    assert ours.accuracy == pytest.approx(theirs.accuracy)
  assert report.data.tokens == float(sums.tokens)


def test_ends_of_the_thresholds_are_the_last_and_the_first_exit(report):
  assert report.confidences == ('margin', 'max_prob')
  for name in report.confidences:
    full, middle, first = report.rows_of(name)
    assert [full.threshold, middle.threshold, first.threshold] == [1.0, 0.3, 0.0]
    assert full.nll == report.exits[-1].nll
    assert first.nll == report.exits[0].nll
    assert (full.agreement, full.effective_layers, first.effective_layers) == (1.0, 3.0, 1.0)
    assert 1.0 < middle.effective_layers < 3.0
  assert report.exit_agreement[-1] == 1.0
  assert report.oracle.agreement == 1.0


def test_decoding_was_timed_with_the_first_measure(report):
  speed = report.speed
  assert (speed.confidence, speed.prompts, speed.prompt_tokens) == ('margin', 2, 6)
  assert (speed.new_tokens, speed.repeats) == (6, 1)
  full, _, first = speed.rows
  assert (full.agreement, full.effective_layers, full.layer_passes) == (1.0, 3.0, 3.0)
  assert first.effective_layers == 1.0
  assert first.layer_passes < 3.0
  assert all(row.tokens_per_second > 0 and row.speed_up > 0 for row in speed.rows)


def test_facts(report, loaded, corpus):
  assert (report.model.directory, report.model.step) == ('runs/tiny', 7)
  sizes = [leaf.size for leaf in jax.tree.leaves(loaded.params)]
  assert report.model.parameters == sum(sizes)
  assert report.model.depths == (1, 2, 3)
  assert (report.data.tasks, report.data.digest) == (('words',), corpus.digest)
  assert report.machine.devices == 1
  assert report.machine.jax == jax.__version__
  assert report.seconds > 0


def test_a_mesh_gives_the_same_report(corpus, one_device):
  mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
  small = {'num_layers': 2, 'exits': (ExitConfig(layer=1),)}
  spread = evaluate.evaluate(make_loaded(corpus.tokenizer, mesh, **small), corpus, CONFIG)
  alone = evaluate.evaluate(make_loaded(corpus.tokenizer, one_device, **small), corpus, UNTIMED)
  assert spread.machine.mesh == 'data=2 x pipeline=1 x tensor=2'
  for ours, theirs in zip(spread.thresholds, alone.thresholds, strict=True):
    assert ours.nll == pytest.approx(theirs.nll, rel=1e-4)
    assert ours.exit_shares == pytest.approx(theirs.exit_shares, abs=0.02)
  full = spread.speed.rows[0]
  assert (full.agreement, full.effective_layers) == (1.0, 2.0)


def test_both_long_steps_show_themselves(loaded, corpus):
  labels = []

  def progress(items, *, total, label):
    items = list(items)
    assert len(items) == total
    labels.append(label)
    return iter(items)

  evaluate.evaluate(loaded, corpus, CONFIG, progress=progress)
  assert labels == ['scoring held-out text', 'timing decoding, 1 of 1']


def test_a_model_without_exits_on_a_device_without_a_mesh(corpus, one_device):
  bare = make_loaded(corpus.tokenizer, one_device, num_layers=1, exits=())
  bare = dataclasses.replace(bare, params=jax.device_put(bare.params, jax.devices()[3]))
  report = evaluate.evaluate(bare, corpus, CONFIG)
  assert report.machine.devices == 1
  assert [score.name for score in report.exits] == ['final']
  assert {row.exit_shares for row in report.thresholds} == {(1.0,)}
  assert report.speed.rows == ()
  assert report.speed.full_tokens_per_second > 0
  assert 'final' in evaluate.render_report(report)


def test_times_can_be_left_out(loaded, corpus):
  assert evaluate.evaluate(loaded, corpus, UNTIMED).speed is None


def test_another_tokenizer_is_refused(loaded, corpus, tmp_path):
  class Other(data.ByteTokenizer):
    digest = 'f' * 64

  other = dataclasses.replace(loaded, tokenizer=Other())
  with pytest.raises(UserError, match='does not match checkpoint runs/tiny'):
    evaluate.evaluate(other, corpus, UNTIMED)


def test_what_does_not_fit_fails_before_scoring(loaded, corpus):
  def progress(items, *, total, label):
    raise AssertionError(f'{label} was begun')

  config = dataclasses.replace(CONFIG, speed_new_tokens=500)
  with pytest.raises(UserError, match='exceeds the context of 64'):
    evaluate.evaluate(loaded, corpus, config, progress=progress)
