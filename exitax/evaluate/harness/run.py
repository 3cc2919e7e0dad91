"""The one call: a model and open tasks in, a report with a row per exit and policy out."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel
from exitax.data import Progress, quiet
from exitax.decode import Confidence
from exitax.evaluate.facts import machine_facts, model_facts
from exitax.evaluate.harness.library import ChatFn, import_library, one_process
from exitax.evaluate.harness.report import RowResult, TaskReport
from exitax.evaluate.harness.rows import FirstConfident, FixedDepth, Row
from exitax.evaluate.harness.scoring import Scorer
from exitax.evaluate.harness.tasks import OpenTasks
from exitax.evaluate.harness.writing import TextWriter
from exitax.parallel import ShardingRules

# Of what the harness returns: numbers, and what they mean nothing without.
_KEPT = (
  'results',
  'groups',
  'group_subtasks',
  'versions',
  'n-shot',
  'higher_is_better',
  'n-samples',
)


def run_tasks(
  loaded: LoadedModel,
  tasks: OpenTasks,
  rows: Sequence[Row],
  *,
  mesh: Mesh,
  rules: ShardingRules,
  chat: ChatFn | None = None,
  progress: Progress = quiet,
) -> TaskReport:
  """Runs tasks once for each row. Given texts are scored in one pass for all rows.

  Args:
    loaded: the model, on the mesh.
    tasks: what `open_tasks` returned.
    rows: of `make_rows`; rows with thresholds share one measure of confidence.
    mesh: where the work is done.
    rules: how batches are spread over it.
    chat: makes a prompt of messages, to put questions as a chat; None puts them as plain text.
    progress: wraps what takes long.

  Raises:
    UserError: a task asks for what the model cannot do.
  """
  from exitax.evaluate.harness.adapter import ExitaxLM  # Late: it needs lm_eval.

  start = time.monotonic()
  size = tasks.config.batch_size
  on_mesh: dict[str, Any] = {'mesh': mesh, 'rules': rules, 'batch_size': size, 'progress': progress}
  scorer = Scorer(loaded, rows, measure=_measure(rows), **on_mesh)
  writer = TextWriter(loaded, **on_mesh)
  results = []
  for row in rows:
    lm = ExitaxLM(loaded, row, scorer=scorer, writer=writer, chat=chat)
    begin = time.monotonic()
    found = _evaluate(lm, tasks, as_chat=chat is not None)
    results.append(_row_result(row, found, layers=lm.meter.mean, seconds=time.monotonic() - begin))
  return TaskReport(
    model=model_facts(loaded),
    machine=machine_facts(mesh),
    tasks=tasks.names,
    limit=tasks.config.limit,
    num_fewshot=tasks.config.num_fewshot,
    chat_template=chat is not None,
    bootstrap=tasks.config.bootstrap,
    libraries={name: metadata.version(name) for name in ('lm_eval', 'datasets')},
    rows=tuple(results),
    seconds=time.monotonic() - start,
  )


def _measure(rows: Sequence[Row]) -> Confidence:
  return next((row.measure for row in rows if isinstance(row, FirstConfident)), Confidence.MAX_PROB)


def _evaluate(lm: Any, tasks: OpenTasks, *, as_chat: bool) -> dict[str, Any]:
  """What the harness makes of the model's answers."""
  tasks.reset()
  # The library prints what it bootstraps between our tables.
  with one_process(), contextlib.redirect_stdout(io.StringIO()):
    found = import_library('lm_eval.evaluator').evaluate(
      lm=lm,
      task_dict=tasks.loaded,
      limit=tasks.config.limit,
      bootstrap_iters=tasks.config.bootstrap,
      log_samples=False,
      apply_chat_template=as_chat,
      fewshot_as_multiturn=as_chat,
    )
  return {name: found[name] for name in _KEPT if name in found}


def _row_result(
  row: Row, found: dict[str, Any], *, layers: float | None, seconds: float
) -> RowResult:
  confident = row if isinstance(row, FirstConfident) else None
  return RowResult(
    name=row.name,
    layer=row.layer if isinstance(row, FixedDepth) else None,
    threshold=confident.threshold if confident else None,
    confidence=confident.measure.value if confident else None,
    policy=type(row.policy).__name__,
    layers_per_token=layers,
    harness=found,
    seconds=seconds,
  )
