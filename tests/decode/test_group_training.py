"""A group is trained with the mask and the positions that it is decoded with."""

from __future__ import annotations

import numpy as np
import pytest

from exitax.data import ByteTokenizer, GroupMix, GroupRows
from exitax.data.group_tasks import EnumerationTask
from exitax.decode import Group, Sees, ThinkConfig, Thinker
from exitax.layers import Precision
from exitax.models import logits_at_exits
from tests.decode.group_oracle import run_groups


@pytest.mark.parametrize('lag', [0, 1, 3, -1])
def test_a_row_scores_what_its_group_would(x64, tiny, lag):
  """The texts of a row as headers of thinkers: every token's scores, fed one a step, are the row's."""
  model, params = tiny(precision=Precision.FLOAT64, num_layers=3, vocab_size=264)
  mix = GroupMix(thinkers=(3,), lags=(lag,), slots=4, slot_width=16)
  rows = GroupRows(EnumerationTask(num_items=6), mix, tokenizer=ByteTokenizer(), length=96, seed=1)
  row = rows[2]
  # Behind others in its row; the last one may be cut off.
  here, owner = row.segment_ids == 2, row.origin.owner
  prompt = row.tokens[here & (owner < 0)].tolist()
  places = [np.flatnonzero(here & (owner == number)) for number in range(3)]
  group = Group(
    prompt=prompt,
    thinkers=[
      Thinker(
        header=row.tokens[own].tolist(),
        slot=int(row.positions[own[0]] - len(prompt)) // mix.slot_width,
        max_new_tokens=1,
      )
      for own in places
    ],
    sees=Sees.parse('none' if lag < 0 else f'lag:{lag}'),
  )
  _, fed = run_groups(model, params, [group], ThinkConfig(slot_width=mix.slot_width))
  batch = [x[None] for x in (row.tokens, row.segment_ids, row.positions)]
  origin = type(row.origin)(**{name: x[None] for name, x in vars(row.origin).items()})
  scores = np.asarray(logits_at_exits(model, params, *batch, origin=origin))[-1, 0]
  checked = 0
  for item in fed:
    if 0 <= item.step < len(places[item.text]):
      wanted = scores[places[item.text][item.step]]
      assert np.abs(item.scores - wanted).max() <= 1e-12 * np.abs(scores).max()
      checked += 1
  assert checked == sum(map(len, places)) > 12
