from __future__ import annotations

import pytest

from exitax.checkpoint import SAMPLING_FILE, load_sampling, write_sampling
from exitax.errors import UserError


def test_it_comes_back(tmp_path):
  assert load_sampling(tmp_path) == {}
  write_sampling(tmp_path, {'temperature': 0.6, 'top_k': 20})
  assert load_sampling(tmp_path) == {'temperature': 0.6, 'top_k': 20}


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('{', 'is not valid JSON'),
    ('[]', 'is not an object'),
    ('{"beams": 4}', 'has beams: known are temperature, top_k'),
    ('{"top_k": 0.5}', 'top_k=0.5 is not a number of its kind'),
    ('{"temperature": true}', 'temperature=True is not a number'),
    ('{"temperature": "hot"}', "temperature='hot' is not a number"),
  ],
)
def test_damage_is_named(tmp_path, text, words):
  (tmp_path / SAMPLING_FILE).write_text(text)
  with pytest.raises(UserError, match=words):
    load_sampling(tmp_path)
