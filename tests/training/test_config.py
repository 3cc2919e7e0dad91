from __future__ import annotations

import dataclasses

import pytest

from exitax import objectives, training
from exitax.errors import UserError


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    *(
      ({name: 0}, rf'^{name}=0 must be at least 1$')
      for name in ('train_steps', 'accumulation_steps', 'log_period', 'checkpoint_period')
    ),
    *(
      ({name: -1}, rf'^{name}=-1 is negative: choose 0 or more$')
      for name in ('eval_period', 'profile_start', 'profile_steps', 'seed')
    ),
  ],
)
def test_bad_loops_are_named(values, message):
  with pytest.raises(UserError, match=message):
    training.LoopConfig(**{'train_steps': 1, **values})


def test_parts_must_fit_each_other(tiny, tmp_path):
  config = tiny.make_config(tmp_path)
  longer = dataclasses.replace(config.data, length=65)
  with pytest.raises(UserError, match=r'^data length=65 exceeds the context max_length=64: '):
    dataclasses.replace(config, data=longer)
  loop = dataclasses.replace(config.loop, accumulation_steps=3)
  with pytest.raises(UserError, match=r'^accumulation_steps=3 does not divide batch_size=8: '):
    dataclasses.replace(config, loop=loop)
  with pytest.raises(UserError, match=r'^0 exit weights for 1 exits: '):
    dataclasses.replace(config, objective=objectives.ObjectiveConfig())
