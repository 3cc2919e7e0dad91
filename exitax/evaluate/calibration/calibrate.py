"""The one call: a trained model and examples in, a decision about thresholds out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel
from exitax.data import Progress, quiet
from exitax.decode import Completion
from exitax.errors import UserError
from exitax.evaluate.calibration.config import CalibrateConfig, Forcing, Method
from exitax.evaluate.calibration.examples import Examples
from exitax.evaluate.calibration.losses import (
  Metric,
  bits_per_byte_losses,
  forced_disagreement,
  mismatch,
  rouge_l_loss,
  token_disagreement,
)
from exitax.evaluate.calibration.outputs import Decoder, text_tables
from exitax.evaluate.calibration.report import CalibrationReport
from exitax.evaluate.calibration.risk import (
  RiskDecision,
  conformal_risk_control,
  learn_then_test,
)
from exitax.evaluate.facts import machine_facts, model_facts
from exitax.evaluate.thresholds import first_exit
from exitax.evaluate.token_table import TokenTable
from exitax.parallel import ShardingRules, use

# Thresholds after the first that fails, for the picture.
_SHOWN_BEYOND = 2


def calibrate(
  loaded: LoadedModel,
  examples: Examples,
  config: CalibrateConfig,
  *,
  mesh: Mesh,
  rules: ShardingRules = ShardingRules(),
  progress: Progress = quiet,
) -> CalibrationReport:
  """Measures every example's loss at every threshold and certifies the lowest threshold that passes.

  Args:
    loaded: the model, on `mesh`.
    examples: drawn by chance from what the guarantee is to be about, and used for nothing else.
    config: loss, limit and method.
    mesh: devices; examples are not spread over it.
    rules: how parameters lie on it.
    progress: how the long steps show themselves.

  Raises:
    UserError: a model without exits.
  """
  start = time.monotonic()
  if not loaded.model.config.exits:
    raise UserError(f'{loaded.directory} has no exits: there is no threshold to calibrate')
  with use(mesh, rules):
    if config.metric.decodes and config.forcing is Forcing.FREE:
      losses, layers = _decoded_losses(loaded, examples, config, progress)
    else:
      losses, layers = _tabled_losses(loaded, examples, config, mesh, rules, progress)
  return CalibrationReport(
    model=model_facts(loaded),
    machine=machine_facts(mesh),
    config=config,
    population=examples.population,
    available=examples.available,
    examples_digest=examples.digest,
    decision=_decide(losses, config),
    layers=tuple(float(value) for value in layers),
    seconds=time.monotonic() - start,
  )


def _decoded_losses(
  loaded: LoadedModel, examples: Examples, config: CalibrateConfig, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
  """Losses `[thresholds, examples]` and mean layers per token `[thresholds]` of free decoding.

  Once a threshold has failed, lower ones cannot be certified any more: a few are decoded for the
  picture, and the rest left out.
  """
  decoder = _decoder(loaded, examples, config)
  loss = _output_loss(loaded, config)
  full: list[Completion] = []
  losses: list[list[float]] = []
  layers: list[float] = []
  failed = 0
  for threshold in config.thresholds:
    outputs = decoder(threshold, progress=progress)
    full = full or outputs
    losses.append([loss(ours, theirs) for ours, theirs in zip(outputs, full, strict=True)])
    layers.append(float(np.mean(np.concatenate([output.exit_layers for output in outputs]))))
    if len(losses) > 1:
      decided = _decide(np.asarray(losses), config)
      failed += not decided.rows[-1].passes or failed > 0
    if failed > _SHOWN_BEYOND:
      break
  return np.asarray(losses), np.asarray(layers)


def _decide(losses: np.ndarray, config: CalibrateConfig) -> RiskDecision:
  thresholds = config.thresholds[: len(losses)]
  if config.method is Method.LTT:
    return learn_then_test(losses, thresholds, limit=config.risk, confidence=config.confidence)
  return conformal_risk_control(losses, thresholds, limit=config.risk)


def _decoder(loaded: LoadedModel, examples: Examples, config: CalibrateConfig) -> Decoder:
  return Decoder(
    loaded.model,
    loaded.params,
    examples.prompts,
    measure=config.measure,
    strategy=config.strategy,
    max_new_tokens=config.max_new_tokens,
    stop_tokens=loaded.tokenizer.stop_ids,
    batch_size=config.batch_size,
  )


def _output_loss(
  loaded: LoadedModel, config: CalibrateConfig
) -> Callable[[Completion, Completion], float]:
  def text(completion: Completion) -> str:
    return loaded.tokenizer.decode(completion.tokens.tolist())

  match config.metric:
    case Metric.EXACT_MATCH:
      return lambda ours, full: mismatch(ours.tokens.tolist(), full.tokens.tolist())
    case Metric.ROUGE:
      return lambda ours, full: rouge_l_loss(text(ours), text(full))
    case _:
      return lambda ours, full: token_disagreement(ours.tokens.tolist(), full.tokens.tolist())


def _tabled_losses(
  loaded: LoadedModel,
  examples: Examples,
  config: CalibrateConfig,
  mesh: Mesh,
  rules: ShardingRules,
  progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
  """The same from one teacher-forced pass, over held-out text or over full depth's own."""
  texts: Sequence[Sequence[int]] = examples.texts
  skip = [1] * len(texts)
  if config.metric.decodes:
    full = _decoder(loaded, examples, config)(1.0, progress=progress)
    texts = [
      (*prompt, *completion.tokens.tolist())
      for prompt, completion in zip(examples.prompts, full, strict=True)
    ]
    skip = [len(prompt) for prompt in examples.prompts]
  tables = text_tables(
    loaded.model,
    loaded.params,
    texts,
    skip=skip,
    measure=config.measure,
    mesh=mesh,
    rules=rules,
    batch_size=config.batch_size,
    progress=progress,
  )
  measure = config.measure.value
  loss = _table_loss(config, measure)
  losses = np.stack([loss(table) for table in tables], axis=1)
  confidence = np.concatenate([table.confidence[measure] for table in tables], axis=1)
  depths = np.asarray(loaded.model.config.depths)
  layers = [
    float(np.mean(depths[first_exit(confidence[:-1] > threshold)]))
    for threshold in config.thresholds
  ]
  return losses, np.asarray(layers)


def _table_loss(config: CalibrateConfig, measure: str) -> Callable[[TokenTable], np.ndarray]:
  if config.metric is Metric.BITS_PER_BYTE:
    return lambda table: bits_per_byte_losses(
      table.nll, table.confidence[measure], config.thresholds
    )
  return lambda table: forced_disagreement(
    table.agrees, table.confidence[measure], config.thresholds
  )
