from __future__ import annotations

import pytest

from exitax.evaluate import held_out_prompts


@pytest.fixture(scope='session')
def held_out(corpus):
  """Three prompts of held-out text."""
  return held_out_prompts(corpus, count=3, num_tokens=6)
