from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shlex

import numpy as np
import pytest

from exitax import decode
from exitax.decode import DraftCosts, Speculative
from exitax.errors import UserError
from exitax.evaluate import PromptDecoder
from exitax.evaluate.advice import (
  AdviseConfig,
  Check,
  Outcome,
  advise,
  render_advice,
  time_policies,
  tokens_per_round,
  verdict_of,
  write_advice,
)
from exitax.evaluate.advice.picture import draw_advice
from exitax.evaluate.calibration.outputs import text_tables
from exitax.parallel import ShardingRules
from tests.evaluate.conftest import make_loaded

SMALL = AdviseConfig(
  rows=8,
  prompts=2,
  prompt_tokens=6,
  new_tokens=12,
  max_drafts=3,
  thresholds=(1.0, 0.5, 0.0),
  part_repeats=1,
  repeats=1,
)


@pytest.fixture(scope='module')
def report(loaded, corpus, one_device):
  return advise(loaded, corpus, SMALL, mesh=one_device)


def test_everything_is_there(report):
  assert [item.layer for item in report.exits] == [1, 2]
  for item in report.exits:
    assert 0 <= item.held_out_agreement <= 1
    assert item.reach[0] == 1
    assert np.all(np.diff(item.reach) <= 0)
  assert 1 <= report.oracle_layers <= 3
  assert [(row.layer, row.num_drafts) for row in report.speculation] == [
    (layer, d) for layer in (1, 2) for d in (1, 2, 3)
  ]
  assert all(1 <= row.tokens_per_round <= row.num_drafts + 1 for row in report.speculation)
  first, *_, last = report.thresholds
  assert (first.agreement, first.layers) == (1.0, 3.0)
  assert last.layers == 1.0
  assert [check.name for check in report.checks] == [
    'speculative',
    'speculative, adaptive',
    'deferred',
    'copy_state',
  ]
  assert all(check.same_text == 1 for check in report.checks[:2])


def test_measured_costs_fit_speculation(report, loaded):
  policy = Speculative(max_drafts=3, costs=DraftCosts(**report.draft_costs))
  assert policy.plan(loaded.model.config).costs.plain > 0


def test_rounds_are_those_of_speculation(loaded, held_out, one_device):
  """Counted along the text of full depth, and run: the same number, to the round."""
  full = decode.generate(loaded.model, loaded.params, held_out, max_new_tokens=40)
  texts = [(*a, *b) for a, b in zip(held_out, full.tokens, strict=True)]
  tables = text_tables(
    loaded.model,
    loaded.params,
    texts,
    skip=[len(prompt) for prompt in held_out],
    measure=decode.Confidence.MAX_PROB,
    mesh=one_device,
    rules=ShardingRules(),
    batch_size=2,
  )
  for index, layer, num_drafts in ((0, 1, 3), (1, 2, 2)):
    policy = Speculative(exit_layer=layer, num_drafts=num_drafts)
    for prompt, table in zip(held_out, tables, strict=True):
      (run,) = decode.generate(
        loaded.model, loaded.params, [prompt], max_new_tokens=40, policy=policy
      ).completions
      counted = 40 / tokens_per_round([table.agrees[index]], num_drafts)
      assert counted == pytest.approx(run.passes[-1])


def test_policies_are_timed_in_turns(loaded, held_out):
  decoder = PromptDecoder(
    loaded.model,
    loaded.params,
    held_out,
    new_tokens=8,
    confidence=decode.Confidence.MAX_PROB,
  )
  policies = {
    'full': decode.FullDepth(),
    'speculative': Speculative(exit_layer=1, num_drafts=2),
    'never': decode.DeferredExit(threshold=1.0),
    'always': decode.DeferredExit(threshold=0.0),
  }
  speeds = time_policies(decoder, policies, repeats=2, max_seconds=60)
  assert speeds['full'].speed_up == 1
  for name in ('full', 'speculative', 'never'):
    assert speeds[name].same_text == 1
  assert speeds['always'].same_text < 1
  assert all(speed.tokens_per_second > 0 for speed in speeds.values())


def checked(report, *, lossless: float, lossy: float):
  """The report as if these had been measured."""
  checks = (
    Check(name='speculative', predicted=1.0, measured=lossless, same_text=1.0),
    Check(name='deferred', predicted=1.0, measured=lossy, same_text=0.9),
  )
  return dataclasses.replace(report, checks=checks)


def assert_runs(line: str) -> None:
  """The command that is printed has all flags that it needs, and none that it lacks."""
  _, name, *arguments = shlex.split(line)
  command = importlib.import_module(f'exitax.commands.{name}')
  parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
  command.add_arguments(parser)
  flags, unknown = parser.parse_known_args(arguments)
  assert not unknown
  assert name != 'generate' or flags.prompt


@pytest.mark.parametrize(
  ('lossless', 'lossy', 'outcome', 'beginning', 'command'),
  [
    (1.5, 1.0, Outcome.LOSSLESS, 'Early exit pays for this model on this data: specul', 'generate'),
    (1.0, 1.5, Outcome.THRESHOLD, 'Early exit pays for this model on this data if', 'calibrate'),
    (1.05, 1.05, Outcome.NEITHER, 'Early exit does not pay for this model on this', '=full'),
  ],
)
def test_verdicts(report, lossless, lossy, outcome, beginning, command):
  changed = checked(report, lossless=lossless, lossy=lossy)
  verdict = verdict_of(changed)
  assert verdict.outcome == outcome.value
  assert verdict.text.startswith(beginning)
  assert f'{lossless:.2f}x (measured; predicted' in verdict.text
  assert command in verdict.command
  assert_runs(verdict.command)
  assert draw_advice(changed)._suptitle.get_text().startswith('Early exit')  # type: ignore[union-attr]


def test_a_verdict_says_what_stands_in_the_way(report):
  dear = {'rounds': ((9.0,) * 3, (9.0,) * 3), 'plain': 1.0}
  changed = dataclasses.replace(checked(report, lossless=0.5, lossy=0.5), draft_costs=dear)
  assert 'Even an exit that always agreed' in verdict_of(changed).text
  cheap = {'rounds': ((1.0,) * 3, (1.0,) * 3), 'plain': 1.0}
  changed = dataclasses.replace(checked(report, lossless=0.5, lossy=0.5), draft_costs=cheap)
  assert 'Train it more' in verdict_of(changed).text


def test_without_measurements_predictions_decide(report):
  assert '(predicted)' in verdict_of(dataclasses.replace(report, checks=())).text


def test_text_and_files(report, tmp_path):
  text = render_advice(report)
  for part in ('(measured)', '(predicted)', 'Predictions beside measurements', 'best'):
    assert part in text
  picture, table = write_advice(report, tmp_path)
  assert picture.read_bytes().startswith(b'\x89PNG')
  content = json.loads(table.read_bytes())
  assert content['verdict']['text'] in text
  assert [len(rounds) for rounds in content['draft_costs']['rounds']] == [3, 3]


def test_mistakes(corpus, one_device, loaded):
  plain = make_loaded(corpus.tokenizer, one_device, exits=())
  with pytest.raises(UserError, match='has no exits: train it with some'):
    advise(plain, corpus, SMALL, mesh=one_device)
  with pytest.raises(UserError, match='exceeds the context of 64'):
    advise(loaded, corpus, dataclasses.replace(SMALL, new_tokens=99), mesh=one_device)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'measure': 'cosine'}, 'choose max_prob, margin, entropy'),
    ({'measure': 'luck'}, "measure='luck' is not known"),
    ({'max_drafts': 32}, 'max_drafts=32 is outside 1 to 31'),
    ({'agreement': 0}, r'agreement=0 is outside \(0, 1\]'),
    ({'worthwhile': 0.5}, r'worthwhile=0\.5 must be at least 1'),
    ({'prompts': 0}, 'prompts=0 must be at least 1'),
    ({'thresholds': (2,)}, r'threshold=2 is outside \[0, 1\]'),
  ],
)
def test_settings_out_of_range(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SMALL, **changes)
