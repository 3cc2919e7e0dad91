"""What of the GPU's benchmark holds without a GPU: sizes, flops, the twin in torch, and how it ends."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from exitax.layers import Precision
from exitax.layers.causal import attention_blocks
from exitax.models import ExitConfig, ExitLM, ModelConfig
from exitax.objectives import ObjectiveConfig, exit_objective

TINY = ModelConfig(
  vocab_size=32,
  num_layers=4,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
  max_length=8,
  exits=(ExitConfig(layer=1), ExitConfig(layer=2)),
)


@pytest.fixture
def train_gpu(monkeypatch, repository):
  """The program as a module."""
  monkeypatch.syspath_prepend(str(repository / 'benchmarks'))
  return importlib.import_module('train_gpu')


def test_the_largest_number_of_layers_that_fits_is_chosen(train_gpu):
  sizes = train_gpu.layer_counts(24)
  assert sizes == [24, 20, 16, 12, 8, 4]

  def choose(budget):
    return train_gpu.choose_layers(lambda layers: 10.0 * layers, budget, sizes)

  assert [choose(budget) for budget in (1000, 240, 239, 45, 1)] == [24, 24, 20, 4, 4]


def test_the_model_is_that_of_the_gin_file_and_shrinks_with_its_exits(train_gpu):
  config = train_gpu.model_config()
  assert (config.num_layers, config.embed_dim, config.max_length) == (24, 2048, 2048)
  assert config.precision is Precision.BFLOAT16
  assert train_gpu.shrink(config, 24) == config
  smaller = train_gpu.shrink(config, 16)
  assert [item.layer for item in smaller.exits] == [4, 8]
  assert dataclasses.replace(smaller, num_layers=24, exits=config.exits) == config


def test_memory_counts_both_sides_and_grows_with_the_layers(train_gpu):
  config = train_gpu.model_config()
  for with_torch in (False, True):
    sizes = [
      train_gpu.needed_bytes(train_gpu.shrink(config, n), with_torch) / 2**30 for n in (4, 12, 24)
    ]
    assert sizes == sorted(sizes)
    # 1.27 billion parameters in 4 bytes, with gradients and two moments, are 19 GiB.
    assert (1 + with_torch) * 19 < sizes[-1] < (1 + with_torch) * 60


def test_the_models_flops_are_its_products_three_times(train_gpu):
  # Longer than a block of attention, so that what is skipped shows.
  config = dataclasses.replace(TINY, max_length=128, num_kv_heads=4)
  batch = train_gpu.make_batch(2, length=128, vocab_size=config.vocab_size)
  tokens, width = 2 * 128, config.embed_dim
  weights = 4 * width * width + 3 * width * config.mlp_dim
  pairs = 2 * sum((stop - start) * stop for start, stop in attention_blocks(128))
  scores = 3 * tokens * width * config.vocab_size
  forward = 2 * (4 * (tokens * weights + 2 * pairs * width) + scores)
  assert train_gpu.model_flops(config, batch) == 3 * forward


@pytest.mark.parametrize(
  ('message', 'is_memory'),
  [
    ('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5.1GiB', True),
    ('CUDA out of memory. Tried to allocate 2.00 GiB', True),
    ('INVALID_ARGUMENT: shapes differ', False),
  ],
)
def test_running_out_of_memory_is_told_from_other_errors(train_gpu, message, is_memory):
  assert train_gpu.is_out_of_memory(RuntimeError(message)) is is_memory


def test_a_size_that_does_not_fit_is_left_for_a_smaller_one(train_gpu, monkeypatch):
  def measure(config, *args, **options):
    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  monkeypatch.setattr(train_gpu, 'measure', measure)
  assert train_gpu.compare(TINY, None, with_torch=False, repeats=1) is None

  def other(config, *args, **options):
    raise RuntimeError('a fault')

  monkeypatch.setattr(train_gpu, 'measure', other)
  with pytest.raises(RuntimeError, match='a fault'):
    train_gpu.compare(TINY, None, with_torch=False, repeats=1)


def test_ours_alone_has_a_row_and_no_ratio(train_gpu, monkeypatch):
  monkeypatch.setattr(importlib.import_module('common'), 'SETTLE_SECONDS', 0.0)
  rows, goals = train_gpu.compare(TINY, None, with_torch=False, repeats=2)
  assert [row['contender'] for row in rows] == ['exitax']
  assert rows[0]['layers'] == 4 and rows[0]['tokens_per_s'] > 0
  assert [goal.value for goal in goals] == [None, None]
  assert [goal.met for goal in goals] == [None, None]


def test_the_twin_in_torch_has_our_losses(train_gpu):
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  twin = importlib.import_module('early_exit_twin')
  model = ExitLM(TINY)
  rng = np.random.default_rng(0)
  # Larger than at the start of training, and norms that are not one: all that is copied shows.
  params = jax.tree.map(
    lambda x: (1.0 * (x.ndim < 3 and x.shape[-1] == 16) + 0.3 * rng.normal(size=x.shape)).astype(
      np.float32
    ),
    model.abstract_params(),
  )
  batch = train_gpu.make_batch(2, length=8, vocab_size=32)
  weights = np.ones(3, np.float32)
  objective = ObjectiveConfig(exit_weights=(train_gpu.ExitWeight(start=1.0),) * 2)
  _, sums = exit_objective(model, params, batch, weights, config=objective)
  theirs = twin.EarlyExitLlama(TINY, params)
  with torch.no_grad():
    tokens, targets = (torch.tensor(ids).long() for ids in (batch.tokens, batch.targets))
    losses = theirs(tokens, targets).numpy()
  np.testing.assert_allclose(losses, sums.exits.nll / sums.tokens, rtol=1e-4)
  assert len({round(float(loss), 3) for loss in losses}) == 3


def test_a_twin_of_other_exits_is_refused(train_gpu):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  twin = importlib.import_module('early_exit_twin')
  config = dataclasses.replace(TINY, exits=(ExitConfig(layer=2, head='mlp'),))
  with pytest.raises(ValueError, match='after layer 2 is not a norm'):
    twin.EarlyExitLlama(config, ExitLM(config).abstract_params())


def test_without_a_gpu_nothing_is_measured_and_the_last_line_is_the_report(
  repository, subprocess_env
):
  program = repository / 'benchmarks' / 'train_gpu.py'
  done = subprocess.run(
    [sys.executable, str(program), '--quick'],
    env=subprocess_env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  first, *_, last = done.stdout.splitlines()
  assert 'no GPU' in first
  report = json.loads(last)
  assert report['benchmark'] == 'train_gpu'
  assert report['rows'] == []
  assert {(goal['name'], goal['value'], goal['met']) for goal in report['goals']} == {
    ('mfu', None, None),
    ('vs_torch', None, None),
  }
