import jax
import numpy as np
import pytest

from exitax import decode
from exitax.evaluate import measure_draft_costs
from exitax.evaluate.draft_costs import _between, measured_lengths
from exitax.models import ExitConfig, ExitLM, ModelConfig


@pytest.mark.parametrize(
  ('most', 'lengths'), [(1, (1,)), (3, (1, 3)), (5, (1, 3, 4, 5)), (7, (1, 3, 4, 7))]
)
def test_both_ends_of_every_bucket_are_timed(most, lengths):
  assert measured_lengths(most) == lengths


def test_costs_between_are_linear_and_jump_where_lanes_do():
  known = [(1, 2.0), (3, 4.0), (4, 9.0), (7, 12.0)]
  assert _between(np.arange(1, 8), known, (4, 8)) == (2.0, 3.0, 4.0, 9.0, 10.0, 11.0, 12.0)


def test_costs_are_seconds_of_rounds_and_can_be_decoded_with():
  config = ModelConfig(
    vocab_size=32,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    mlp_dim=16,
    max_length=128,
    exits=(ExitConfig(layer=1), ExitConfig(layer=2)),
  )
  model = ExitLM(config)
  params = decode.prepare_params(model, model.init(jax.random.key(0)))
  seen = []

  def progress(items, *, total, label):
    seen.append(total)
    return iter(items)

  costs = measure_draft_costs(model, params, max_drafts=3, repeats=1, progress=progress)
  assert seen == [2 * (1 + 2 * 2)]
  assert costs.plain > 0
  assert [len(rounds) for rounds in costs.rounds] == [3, 3]
  assert all(second > 0 for rounds in costs.rounds for second in rounds)
  policy = decode.Speculative(costs=costs, max_drafts=3)
  full = decode.generate(model, params, [[1, 2]], max_new_tokens=9)
  assert (
    decode.generate(model, params, [[1, 2]], max_new_tokens=9, policy=policy).tokens == full.tokens
  )
