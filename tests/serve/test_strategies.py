"""What requests may say about exits, and what it comes to."""

from __future__ import annotations

import dataclasses

import pytest

from exitax.checkpoint import LoadedModel
from exitax.errors import UserError
from exitax.models import ModelConfig
from exitax.serve.refusals import Refusal
from exitax.serve.strategies import Strategies


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
    {'confidence': 'guess'},
  ],
)
def test_a_server_with_wrong_settings_does_not_start(config: ModelConfig, settings):
  with pytest.raises(UserError):
    Strategies(config, **settings)
