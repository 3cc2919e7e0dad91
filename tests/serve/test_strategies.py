"""What requests may say about exits, and what it comes to."""

from __future__ import annotations

import dataclasses

import pytest

from exitax.checkpoint import Certificate, LoadedModel
from exitax.errors import UserError
from exitax.models import ModelConfig
from exitax.serve.refusals import Refusal
from exitax.serve.strategies import Guarantee, Strategies
from tests.checkpoint.certificates import make_certificate


@pytest.fixture
def config(loaded: LoadedModel) -> ModelConfig:
  return loaded.model.config


@pytest.mark.parametrize(
  ('server', 'fields', 'strategy', 'thresholds'),
  [
    ({}, {}, 'speculative', (1.0, 1.0)),
    ({'threshold': 0.5}, {'strategy': 'speculative'}, 'speculative', (1.0, 1.0)),
    ({'threshold': 0.5}, {}, 'deferred', (0.5, 0.5)),
    ({'threshold': 0.5}, {'use_early_exit': False}, 'full', (1.0, 1.0)),
    ({'threshold': 0.5}, {'use_early_exit': True}, 'deferred', (0.5, 0.5)),
    ({'threshold': 0.5}, {'strategy': 'full'}, 'full', (1.0, 1.0)),
    ({'threshold': 0.5, 'default': 'full'}, {}, 'full', (1.0, 1.0)),
    ({}, {'threshold': 0}, 'deferred', (0.0, 0.0)),
    ({}, {'threshold': 1}, 'deferred', (1.0, 1.0)),
    ({}, {'threshold': [0, 0.5], 'confidence': 'max_prob'}, 'deferred', (0.0, 0.5)),
  ],
)
def test_choices(config: ModelConfig, server, fields, strategy: str, thresholds):
  chosen = Strategies(config, **server).choose(**fields)
  assert (chosen.strategy, chosen.thresholds) == (strategy, thresholds)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'threshold': 1.01}, r'threshold=1.01 is outside \[0, 1\]'),
    ({'threshold': -1}, r'outside \[0, 1\]'),
    ({'threshold': [0.5]}, '1 thresholds for 2 exits'),
    ({'threshold': []}, '0 thresholds for 2 exits'),
    ({'strategy': 'fast'}, "strategy='fast': not known: choose 'full', 'deferred', 'speculative'"),
    ({'strategy': 'deferred'}, 'give threshold'),
    ({'use_early_exit': True}, 'give threshold'),
    ({'confidence': 'margin'}, 'started with --confidence=max_prob'),
    ({'use_early_exit': False, 'threshold': 0.5}, 'contradicts threshold'),
    ({'use_early_exit': False, 'strategy': 'deferred'}, 'contradicts strategy'),
    ({'strategy': 'full', 'threshold': 0.5}, "does nothing with strategy='full'"),
    ({'strategy': 'speculative', 'threshold': 0.5}, "does nothing with strategy='speculative'"),
    ({'strategy': 'full', 'use_early_exit': True}, "does nothing with strategy='full'"),
  ],
)
def test_refusals(config: ModelConfig, fields, words: str):
  with pytest.raises(Refusal, match=words) as refused:
    Strategies(config).choose(**fields)
  assert refused.value.status == 422
  assert refused.value.param in fields or refused.value.param == 'threshold'


def certificate(**changes) -> Certificate:
  """Of the margin, and of a strategy with the tokens of the server's."""
  return make_certificate(**{'measure': 'margin', 'strategy': 'recompute', **changes})


@pytest.mark.parametrize(
  ('fields', 'strategy', 'thresholds'),
  [
    ({'max_tokens': 64}, 'deferred', (0.7, 0.7)),
    ({'max_tokens': 64, 'threshold': 'certified'}, 'deferred', (0.7, 0.7)),
    ({'max_tokens': 64, 'use_early_exit': True}, 'deferred', (0.7, 0.7)),
    ({'max_tokens': 64, 'threshold': 0.2}, 'deferred', (0.2, 0.2)),
    # Nothing was asked for and nothing is guaranteed: nothing is lost.
    ({'max_tokens': 65}, 'speculative', (1.0, 1.0)),
    ({'max_tokens': 64, 'temperature': 0.5}, 'speculative', (1.0, 1.0)),
  ],
)
def test_a_certified_default(config: ModelConfig, fields, strategy: str, thresholds):
  server = Strategies(config, threshold='certified', guarantee=Guarantee(certificate()))
  assert server.confidence.value == 'margin'  # The certificate's.
  chosen = server.choose(**fields)
  assert (chosen.strategy, chosen.thresholds) == (strategy, thresholds)


@pytest.mark.parametrize(
  ('guarantee', 'fields', 'words'),
  [
    (None, {}, 'this model has no certificate'),
    (Guarantee(certificate()), {'max_tokens': 65}, 'at most 64 new tokens'),
    (Guarantee(certificate()), {'temperature': 0.5}, 'greedy'),
    (Guarantee(certificate(measure='entropy')), {}, 'confidence=margin: the certificate'),
    (Guarantee(certificate(strategy='copy_state')), {}, 'strategy=deferred: the certificate'),
    (Guarantee(certificate(), weights='int8'), {}, 'weights=int8: the certificate'),
    (Guarantee(certificate(), kv_cache='int8'), {}, 'kv_cache=int8: the certificate'),
  ],
)
def test_requests_that_no_certificate_speaks_of(config: ModelConfig, guarantee, fields, words):
  server = Strategies(config, confidence='margin', guarantee=guarantee)
  with pytest.raises(Refusal, match=words) as refused:
    server.choose(threshold='certified', **fields)
  assert (refused.value.status, refused.value.param) == (422, 'threshold')
  if not fields:  # Then a server that is to hold it for all requests does not start.
    with pytest.raises(UserError, match=words):
      Strategies(config, confidence='margin', threshold='certified', guarantee=guarantee)


@pytest.mark.parametrize(
  'fields',
  [
    {'strategy': 'deferred'},
    {'strategy': 'speculative'},
    {'threshold': 0.5},
    {'use_early_exit': True},
  ],
)
def test_a_model_without_exits_says_so(config: ModelConfig, fields):
  strategies = Strategies(dataclasses.replace(config, exits=()))
  with pytest.raises(Refusal, match='the model has no exits') as refused:
    strategies.choose(**fields)
  assert refused.value.status == 422
  assert strategies.choose(use_early_exit=False).thresholds == ()


@pytest.mark.parametrize(
  'settings',
  [
    {'default': 'fast'},
    {'default': 'deferred'},
    {'threshold': 2.0},
    {'threshold': (0.1, 0.2, 0.3)},
    {'threshold': 'certain'},
    {'threshold': 'certified'},
    {'confidence': 'guess'},
  ],
)
def test_a_server_with_wrong_settings_does_not_start(config: ModelConfig, settings):
  with pytest.raises(UserError):
    Strategies(config, **settings)
