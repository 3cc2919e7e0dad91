from __future__ import annotations

import pytest

from exitax.decode import Confidence
from exitax.errors import UserError
from exitax.evaluate import DEFAULT_THRESHOLDS, EvaluateConfig


def test_defaults():
  config = EvaluateConfig()
  assert config.thresholds == DEFAULT_THRESHOLDS
  assert len(config.thresholds) == 21
  assert config.measures == (Confidence.MAX_PROB, Confidence.MARGIN, Confidence.ENTROPY)


@pytest.mark.parametrize('given', ['margin', Confidence.MARGIN, ['margin'], (Confidence.MARGIN,)])
def test_confidence_is_one_or_several_by_name_or_member(given):
  assert EvaluateConfig(confidence=given).measures == (Confidence.MARGIN,)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'thresholds': (0.5, 1.5)}, r'threshold=1.5 is outside \[0, 1\]'),
    ({'thresholds': ()}, 'no thresholds'),
    ({'confidence': 'mood'}, "confidence='mood' is not known: choose 'max_prob'"),
    ({'confidence': ()}, 'empty or repeats'),
    ({'confidence': ('margin', 'margin')}, 'empty or repeats'),
    ({'rows': 0}, 'rows=0 must be at least 1'),
    ({'chunk_length': 0}, 'chunk_length=0 must be at least 1'),
    ({'speed_prompts': -1}, 'speed_prompts=-1 must be at least 0'),
    ({'speed_prompt_tokens': 0}, 'speed_prompt_tokens=0 must be at least 1'),
    ({'speed_new_tokens': 0}, 'speed_new_tokens=0 must be at least 1'),
    ({'speed_repeats': 0}, 'speed_repeats=0 must be at least 1'),
    ({'speed_seconds': float('nan')}, 'speed_seconds=nan must be 0 or more'),
  ],
)
def test_values_out_of_range_are_named(changes, message):
  with pytest.raises(UserError, match=message):
    EvaluateConfig(**changes)
