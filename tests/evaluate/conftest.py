"""A tiny model with exits after layers 1 and 2 of 3, a tiny corpus, and a report without either."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from exitax import data, evaluate
from exitax.checkpoint import LoadedModel
from exitax.models import ExitConfig, ExitLM, ModelConfig
from exitax.objectives import ExitScore
from exitax.parallel import MeshConfig, ShardingRules, init_sharded, make_mesh

DEPTHS = (1, 2, 4)
BYTES_PER_TOKEN = 2.0


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> data.Data:
  """Words by chance, as bytes, in rows of 16, some of them padded or cut by documents."""
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for i in range(24):
    words = rng.choice(['tea', 'salt', 'moss', 'elm', 'fog', 'oak'], size=12)
    (folder / f'{i:02}.txt').write_text(' '.join(words))
  config = data.DataConfig(
    mixture=data.Task('words', data.TextSource((str(folder),))),
    vocabulary=data.ByteVocabulary(),
    length=16,
    batch_size=4,
    split=data.SplitConfig(fraction=0.3, similarity=1.0),
  )
  return data.build_data(config, progress=data.quiet)


def make_loaded(tokenizer, mesh, **changes) -> LoadedModel:
  """A random model on `mesh`; weights are enlarged so that exits differ and are sure at times."""
  config = ModelConfig(
    **{
      'vocab_size': 264,
      'num_layers': 3,
      'embed_dim': 16,
      'num_heads': 2,
      'mlp_dim': 32,
      'max_length': 64,
      'exits': (ExitConfig(layer=1), ExitConfig(layer=2)),
      **changes,
    }
  )
  model = ExitLM(config)
  params = init_sharded(model.init, jax.random.key(1), model.logical_axes(), mesh, ShardingRules())
  return LoadedModel(
    model=model,
    params=jax.tree.map(lambda x: x * 5, params),
    tokenizer=tokenizer,
    step=7,
    directory=Path('runs/tiny'),
  )


@pytest.fixture(scope='session')
def one_device():
  return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='session')
def loaded(corpus, one_device) -> LoadedModel:
  return make_loaded(corpus.tokenizer, one_device)


def make_table(num_tokens: int = 400, seed: int = 0) -> evaluate.TokenTable:
  """Random tokens of three exits; the final layer agrees with itself."""
  rng = np.random.default_rng(seed)
  shape = (len(DEPTHS), num_tokens)
  agrees = rng.random(shape) < 0.6
  agrees[-1] = True
  return evaluate.TokenTable(
    nll=rng.gamma(2, 1, shape).astype(np.float32),
    correct=rng.random(shape) < 0.4,
    agrees=agrees,
    confidence={
      'max_prob': rng.uniform(0.01, 1, shape).astype(np.float32),
      'margin': rng.random(shape).astype(np.float32),
    },
  )


def make_report(*, timed: bool = True) -> evaluate.EvaluationReport:
  """A report with numbers from `make_table` and invented times."""
  table = make_table()
  text = {'depths': DEPTHS, 'bytes_per_token': BYTES_PER_TOKEN}
  thresholds = (1.0, 0.9, 0.5, 0.0)
  rows = tuple(
    row
    for name in ('max_prob', 'margin')
    for row in evaluate.threshold_rows(table, confidence=name, thresholds=thresholds, **text)
  )
  speed_rows = tuple(
    evaluate.SpeedRow(
      threshold=threshold,
      tokens_per_second=100.0 + i,
      speed_up=1 + 0.25 * i,
      effective_layers=4 - i / 2,
      layer_passes=4 - i / 3,
      agreement=1 - 0.2 * i,
      matching_prefix=8.0 - i,
    )
    for i, threshold in enumerate(thresholds)
  )
  speed = evaluate.SpeedReport(
    confidence='max_prob',
    prompts=2,
    prompt_tokens=8,
    new_tokens=8,
    repeats=3,
    full_tokens_per_second=99.5,
    rows=speed_rows,
  )
  names = ('exit_1', 'exit_2', 'final')
  return evaluate.EvaluationReport(
    model=evaluate.ModelFacts(
      directory='runs/tiny',
      step=7,
      parameters=12345,
      num_layers=4,
      embed_dim=16,
      vocab_size=264,
      precision='float32',
      depths=DEPTHS,
    ),
    data=evaluate.DataFacts(
      tasks=('words',),
      digest='abc',
      tokens=400,
      held_out_tokens=1000,
      length=16,
      bytes_per_token=BYTES_PER_TOKEN,
    ),
    machine=evaluate.MachineFacts(
      processor='Abacus',
      cores=2,
      device='cpu',
      devices=1,
      mesh='data=1',
      python='3.11',
      jax='0.10',
      date='2026-01-02T03:04:05+00:00',
    ),
    exits=tuple(
      ExitScore(name=name, layer=layer, nll=3.0 - i, bits_per_byte=2.0 - i / 2, accuracy=i / 4)
      for i, (name, layer) in enumerate(zip(names, DEPTHS, strict=True))
    ),
    exit_agreement=(0.5, 0.75, 1.0),
    thresholds=rows,
    oracle=evaluate.oracle_score(table, **text),
    speed=speed if timed else None,
    seconds=1.5,
  )
