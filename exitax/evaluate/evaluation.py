"""The one call: a trained model and held-out text in, a report out."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from exitax.checkpoint import LoadedModel
from exitax.data import Data, Progress, check_tokenizer, quiet, shards_of_blocks
from exitax.evaluate.config import EvaluateConfig
from exitax.evaluate.decoding import PromptDecoder, held_out_prompts
from exitax.evaluate.facts import data_facts, machine_facts, model_facts
from exitax.evaluate.report import EvaluationReport
from exitax.evaluate.speed import SpeedReport, measure_speed
from exitax.evaluate.thresholds import oracle_score, threshold_rows
from exitax.evaluate.token_table import TokenTable, token_table
from exitax.objectives import ExitScore
from exitax.parallel import (
  MeshConfig,
  ShardingRules,
  batch_blocks,
  current_rules,
  make_mesh,
  use,
)


def evaluate(
  loaded: LoadedModel,
  data: Data,
  config: EvaluateConfig = EvaluateConfig(),
  *,
  rules: ShardingRules = ShardingRules(),
  progress: Progress = quiet,
) -> EvaluationReport:
  """Scores every exit and every threshold on held-out text, and times decoding.

  Runs on the mesh that the parameters lie on. With several processes each calls it and gets the
  same scores; decoding is then not timed.

  Args:
    loaded: the model, from `exitax.checkpoint.load_model`.
    data: text in the model's own tokenizer.
    config: how much to measure.
    rules: how batches are spread over the mesh, as for `load_model`; by default those of the
      surrounding `exitax.parallel.use`, or else the usual ones.
    progress: how the two long steps show themselves.

  Raises:
    UserError: another tokenizer, a batch that does not spread over the mesh, prompts and new
      tokens that exceed the model's context.
  """
  start = time.monotonic()
  check_tokenizer(
    data.tokenizer, expected_digest=loaded.tokenizer.digest, where=str(loaded.directory)
  )
  rules = rules or current_rules() or ShardingRules()
  mesh = _mesh_of(loaded.params)
  with use(mesh, rules):
    decoder = _decoder(loaded, data, config)  # First: what does not fit fails before long work.
  table = _table(loaded, data, config, mesh=mesh, rules=rules, progress=progress)
  text: dict[str, Any] = {
    'depths': loaded.model.config.depths,
    'bytes_per_token': data.stats.held_out.bytes_per_target,
  }
  rows = [
    row
    for measure in config.measures
    for row in threshold_rows(table, confidence=measure.value, thresholds=config.thresholds, **text)
  ]
  speed = None
  if decoder is not None:
    with use(mesh, rules):
      speed = _speed(decoder, config, progress=progress)
  return EvaluationReport(
    model=model_facts(loaded),
    data=data_facts(data, tokens=table.num_tokens),
    machine=machine_facts(mesh),
    exits=_exit_scores(loaded, table, bytes_per_token=text['bytes_per_token']),
    exit_agreement=tuple(float(share) for share in table.agrees.mean(axis=1)),
    thresholds=tuple(rows),
    oracle=oracle_score(table, **text),
    speed=speed,
    seconds=time.monotonic() - start,
  )


def _mesh_of(params: Any) -> Mesh:
  """The mesh of parameters that `load_model` placed; else one of the devices they lie on."""
  sharding = jax.tree.leaves(params)[0].sharding
  if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
    return sharding.mesh
  return make_mesh(MeshConfig(), sorted(sharding.device_set, key=lambda device: device.id))


def _decoder(loaded: LoadedModel, data: Data, config: EvaluateConfig) -> PromptDecoder | None:
  if not config.speed_prompts or jax.process_count() > 1:
    return None
  return PromptDecoder(
    loaded.model,
    loaded.params,
    held_out_prompts(data, count=config.speed_prompts, num_tokens=config.speed_prompt_tokens),
    new_tokens=config.speed_new_tokens,
    confidence=config.measures[0],
    settings_prefix='speed_',
  )


def _table(
  loaded: LoadedModel,
  data: Data,
  config: EvaluateConfig,
  *,
  mesh: Mesh,
  rules: ShardingRules,
  progress: Progress,
) -> TokenTable:
  blocks = batch_blocks(mesh, rules)
  shards = shards_of_blocks(blocks.own, blocks.total)
  loader = data.eval_loader(shards, max_rows=config.rows)
  return token_table(
    loaded.model,
    loaded.params,
    progress(loader, total=len(loader), label='scoring held-out text'),
    measures={measure.value: measure for measure in config.measures},
    chunk_length=config.chunk_length,
    mesh=mesh,
    rules=rules,
  )


def _speed(decoder: PromptDecoder, config: EvaluateConfig, *, progress: Progress) -> SpeedReport:
  return measure_speed(
    decoder,
    # Without exits there is nothing to compare with full decoding.
    thresholds=config.thresholds if decoder.has_exits else (),
    confidence=config.measures[0].value,
    prompts=decoder.num_prompts,
    prompt_tokens=decoder.prompt_tokens,
    repeats=config.speed_repeats,
    max_seconds=config.speed_seconds,
    progress=progress,
  )


def _exit_scores(
  loaded: LoadedModel, table: TokenTable, *, bytes_per_token: float
) -> tuple[ExitScore, ...]:
  """Every exit alone."""
  model_config = loaded.model.config
  nll = table.nll.mean(axis=1, dtype=np.float64)
  accuracy = table.correct.mean(axis=1)
  return tuple(
    ExitScore(
      name=name,
      layer=layer,
      nll=float(nll[i]),
      bits_per_byte=float(nll[i]) / math.log(2) / bytes_per_token,
      accuracy=float(accuracy[i]),
    )
    for i, (name, layer) in enumerate(
      zip(model_config.depth_names, model_config.depths, strict=True)
    )
  )
