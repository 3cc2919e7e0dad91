"""The one call: does early exit pay for this model, on this data, on this machine?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel
from exitax.data import Data, Progress, check_tokenizer, quiet
from exitax.decode import (
  CopyStateExit,
  DeferredExit,
  DraftCosts,
  ExitPlan,
  ExitPolicy,
  FullDepth,
  Speculative,
  prepare_params,
)
from exitax.errors import UserError
from exitax.evaluate.advice.config import AdviseConfig
from exitax.evaluate.advice.costs import PartCosts, measure_costs
from exitax.evaluate.advice.report import (
  AdviceReport,
  Check,
  ExitFacts,
  SpeculationRow,
  ThresholdSpeed,
  best_threshold,
)
from exitax.evaluate.advice.rounds import (
  copied_work,
  deferred_work,
  geometric_tokens_per_round,
  run_survival,
  tokens_per_round,
)
from exitax.evaluate.advice.timing import PolicySpeed, time_policies
from exitax.evaluate.advice.verdict import ADAPTIVE, COPIED, DEFERRED, SPECULATION
from exitax.evaluate.calibration.outputs import text_tables
from exitax.evaluate.decoding import PromptDecoder, held_out_prompts
from exitax.evaluate.draft_costs import measure_draft_costs
from exitax.evaluate.facts import data_facts, machine_facts, model_facts
from exitax.evaluate.thresholds import first_exit, oracle_score
from exitax.evaluate.token_table import TokenTable, token_table
from exitax.parallel import ShardingRules, use

_LONGEST_RUN = 16


def advise(
  loaded: LoadedModel,
  data: Data,
  config: AdviseConfig = AdviseConfig(),
  *,
  mesh: Mesh,
  rules: ShardingRules = ShardingRules(),
  progress: Progress = quiet,
) -> AdviceReport:
  """Measures agreement and costs, predicts every strategy, and measures the best predictions.

  Args:
    loaded: the model, on `mesh`.
    data: text in the model's own tokenizer.
    config: how much to measure.
    mesh: one device.
    rules: how parameters lie on it.
    progress: how the long steps show themselves.

  Raises:
    UserError: a model without exits, another tokenizer, prompts that do not fit the context.
  """
  start = time.monotonic()
  if not loaded.model.config.exits:
    raise UserError(
      f'{loaded.directory} has no exits: train it with some (ModelConfig.exits) to ask whether they pay'
    )
  check_tokenizer(
    data.tokenizer, expected_digest=loaded.tokenizer.digest, where=str(loaded.directory)
  )
  prompts = held_out_prompts(data, count=config.prompts, num_tokens=config.prompt_tokens)
  with use(mesh, rules):
    decoder = PromptDecoder(
      loaded.model,
      loaded.params,
      prompts,
      new_tokens=config.new_tokens,
      confidence=config.measure,
    )
    held_out = _held_out_table(loaded, data, config, mesh, rules, progress)
    own = _own_tables(loaded, decoder, prompts, config, mesh, rules, progress)
    deferred = DeferredExit(threshold=1.0, confidence=config.measure)
    plan = deferred.plan(loaded.model.config)
    costs = _costs(loaded, decoder, plan, config, progress)
    draft_costs = measure_draft_costs(
      loaded.model,
      prepare_params(loaded.model, loaded.params),
      max_drafts=config.max_drafts,
      length=config.prompt_tokens + config.new_tokens,
      repeats=config.part_repeats,
      progress=progress,
    )
    speculation = _speculation(own, costs.step, draft_costs, loaded.model.config.depths)
    thresholds = _thresholds(own, costs, plan, loaded.model.config.depths, config)
    speeds = time_policies(
      decoder,
      _policies(speculation, thresholds, draft_costs, config),
      repeats=config.repeats,
      max_seconds=config.seconds,
      progress=progress,
    )
  predicted = {
    SPECULATION: max(row.speed_up for row in speculation),
    DEFERRED: best_threshold(thresholds, config.agreement).deferred,
    COPIED: best_threshold(thresholds, config.agreement).copy_state,
  }
  depths = loaded.model.config.depths
  return AdviceReport(
    model=model_facts(loaded),
    data=data_facts(data, tokens=held_out.num_tokens),
    machine=machine_facts(mesh),
    measure=config.measure.value,
    exits=_exit_facts(held_out, own, depths),
    oracle_layers=oracle_score(held_out, depths=depths, bytes_per_token=1.0).effective_layers,
    costs=tuple(costs.to_rows(plan.segments)),
    draft_costs=dataclasses.asdict(draft_costs),
    speculation=speculation,
    thresholds=thresholds,
    agreement=config.agreement,
    worthwhile=config.worthwhile,
    full_tokens_per_second=speeds['full'].tokens_per_second,
    checks=_checks(speeds, predicted),
    seconds=time.monotonic() - start,
  )


def _held_out_table(
  loaded: LoadedModel,
  data: Data,
  config: AdviseConfig,
  mesh: Mesh,
  rules: ShardingRules,
  progress: Progress,
) -> TokenTable:
  loader = data.eval_loader(max_rows=config.rows)
  return token_table(
    loaded.model,
    loaded.params,
    progress(loader, total=len(loader), label='scoring held-out text'),
    measures={config.measure.value: config.measure},
    chunk_length=64,
    mesh=mesh,
    rules=rules,
  )


def _own_tables(
  loaded: LoadedModel,
  decoder: PromptDecoder,
  prompts: Sequence[Sequence[int]],
  config: AdviseConfig,
  mesh: Mesh,
  rules: ShardingRules,
  progress: Progress,
) -> list[TokenTable]:
  """What exits say along the text that full depth writes: a table per prompt."""
  full = FullDepth(confidence=config.measure)
  shown = progress(range(len(prompts)), total=len(prompts), label='writing with full depth')
  texts = [(*prompts[i], *decoder.decode(i, full).tokens.tolist()) for i in shown]
  return text_tables(
    loaded.model,
    loaded.params,
    texts,
    skip=[len(prompt) for prompt in prompts],
    measure=config.measure,
    mesh=mesh,
    rules=rules,
    batch_size=8,
  )


def _costs(
  loaded: LoadedModel,
  decoder: PromptDecoder,
  plan: ExitPlan,
  config: AdviseConfig,
  progress: Progress,
) -> PartCosts:
  context = decoder.prompt_tokens + config.new_tokens // 2

  def per_step(policy: ExitPolicy) -> Callable[[], float]:
    def run() -> float:
      decoded = decoder.decode(0, policy)
      return decoded.seconds / len(decoded.tokens)

    return run

  never = {'threshold': 1.0, 'confidence': config.measure}
  return measure_costs(
    loaded.model,
    loaded.params,
    plan=plan,
    max_drafts=config.max_drafts,
    context=context,
    capacity=decoder.capacity(plan),
    wholes={
      'full': per_step(FullDepth(confidence=config.measure)),
      'deferred': per_step(DeferredExit(**never)),
      'copy_state': per_step(CopyStateExit(**never)),
    },
    repeats=config.part_repeats,
    progress=progress,
  )


def _speculation(
  own: Sequence[TokenTable], step: float, costs: DraftCosts, depths: Sequence[int]
) -> tuple[SpeculationRow, ...]:
  rows = []
  for index, layer in enumerate(depths[:-1]):
    agrees = [table.agrees[index] for table in own]
    share = float(np.mean(np.concatenate(agrees)))
    for num_drafts, seconds in enumerate(costs.rounds[index], start=1):
      counted = tokens_per_round(agrees, num_drafts)
      formula = geometric_tokens_per_round(share, num_drafts)
      rows.append(
        SpeculationRow(
          layer=layer,
          num_drafts=num_drafts,
          tokens_per_round=counted,
          formula=formula,
          speed_up=counted * step / seconds,
          formula_speed_up=formula * step / seconds,
        )
      )
  return tuple(rows)


def _thresholds(
  own: Sequence[TokenTable],
  costs: PartCosts,
  plan: ExitPlan,
  depths: Sequence[int],
  config: AdviseConfig,
) -> tuple[ThresholdSpeed, ...]:
  num_exits = len(depths) - 1
  rows = []
  for threshold in config.thresholds:
    exits = [first_exit(table.confidence[config.measure.value][:-1] > threshold) for table in own]
    kept = [
      table.agrees[taken, np.arange(len(taken))] for table, taken in zip(own, exits, strict=True)
    ]
    texts = [taken.tolist() for taken in exits]
    deferred = deferred_work(
      texts, num_exits=num_exits, capacity=plan.pending_capacity, buckets=plan.lane_buckets
    )
    copied = copied_work(texts, num_exits=num_exits)
    rows.append(
      ThresholdSpeed(
        threshold=threshold,
        agreement=float(np.mean(np.concatenate(kept))),
        layers=float(np.mean(np.asarray(depths)[np.concatenate(exits)])),
        deferred=costs.step / costs.of_work(deferred, 'deferred'),
        copy_state=costs.step / costs.of_work(copied, 'copy_state'),
      )
    )
  return tuple(rows)


def _policies(
  speculation: Sequence[SpeculationRow],
  thresholds: tuple[ThresholdSpeed, ...],
  costs: DraftCosts,
  config: AdviseConfig,
) -> dict[str, ExitPolicy]:
  """What is measured beside its prediction."""
  best = max(speculation, key=lambda row: row.speed_up)
  threshold = best_threshold(thresholds, config.agreement).threshold
  return {
    'full': FullDepth(confidence=config.measure),
    SPECULATION: Speculative(
      exit_layer=best.layer,
      num_drafts=best.num_drafts,
      max_drafts=config.max_drafts,
      confidence=config.measure,
    ),
    ADAPTIVE: Speculative(
      max_drafts=config.max_drafts,
      costs=costs,
      confidence=config.measure,
    ),
    DEFERRED: DeferredExit(threshold=threshold, confidence=config.measure),
    COPIED: CopyStateExit(threshold=threshold, confidence=config.measure),
  }


def _checks(speeds: Mapping[str, PolicySpeed], predicted: Mapping[str, float]) -> tuple[Check, ...]:
  return tuple(
    Check(
      name=name,
      predicted=predicted.get(name),
      measured=speed.speed_up,
      same_text=speed.same_text,
    )
    for name, speed in speeds.items()
    if name != 'full'
  )


def _exit_facts(
  held_out: TokenTable, own: Sequence[TokenTable], depths: Sequence[int]
) -> tuple[ExitFacts, ...]:
  facts = []
  for index, layer in enumerate(depths[:-1]):
    agrees = [table.agrees[index] for table in own]
    facts.append(
      ExitFacts(
        layer=layer,
        held_out_agreement=float(np.mean(held_out.agrees[index])),
        own_agreement=float(np.mean(np.concatenate(agrees))),
        reach=tuple(run_survival(agrees, _LONGEST_RUN).tolist()),
      )
    )
  return tuple(facts)
