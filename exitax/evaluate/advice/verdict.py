"""The verdict in plain language, and the reasons for it."""

from __future__ import annotations

import dataclasses
import enum
import shlex

from exitax.evaluate.advice.report import AdviceReport, ThresholdSpeed

SPECULATION, ADAPTIVE, DEFERRED, COPIED = (
  'speculative',
  'speculative, adaptive',
  'deferred',
  'copy_state',
)


class Outcome(enum.Enum):
  """What to do."""

  LOSSLESS = 'lossless'  # Speculate.
  THRESHOLD = 'threshold'  # Exit at a threshold, after calibrating it.
  NEITHER = 'neither'  # Run every layer.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """What to do, and why.

  Attributes:
    outcome: of `Outcome`, by value.
    text: the verdict in sentences.
    command: what to run next.
  """

  outcome: str
  text: str
  command: str


def verdict_of(report: AdviceReport) -> Verdict:
  """The verdict: measured speed-ups decide where there are any, predicted ones elsewhere."""
  best, threshold = report.best_speculation, report.best_threshold
  name = shlex.quote(report.model.directory)
  generate = f"exitax generate --model_dir={name} --prompt='The '"
  lossless = _speed(report, SPECULATION, best.speed_up)
  lossy = _speed(report, DEFERRED, threshold.deferred)
  drafts = f'{best.num_drafts} draft{"s" if best.num_drafts > 1 else ""}'
  how = f'speculation that drafts after layer {best.layer}, {drafts} a round'
  if lossless >= report.worthwhile:
    return Verdict(
      outcome=Outcome.LOSSLESS.value,
      text=(
        f'Early exit pays for this model on this data: {how}, writes the same text '
        f'{_quoted(report, SPECULATION, best.speed_up)} as fast.{_threshold_aside(report, threshold)}'
      ),
      command=(
        f'{generate} --strategy=speculative --exit_layer={best.layer} '
        f'--num_drafts={best.num_drafts}'
      ),
    )
  if lossy >= report.worthwhile:
    return Verdict(
      outcome=Outcome.THRESHOLD.value,
      text=(
        f'Early exit pays for this model on this data if the text may change: a threshold of '
        f'{threshold.threshold:g} on {report.measure} is {_quoted(report, DEFERRED, threshold.deferred)} as '
        f'fast and keeps {threshold.agreement:.1%} of the choices{_own_text(report)}. Without changes it does not pay: {how}, is '
        f'{_quoted(report, SPECULATION, best.speed_up)}. Certify the threshold before you use it.'
      ),
      command=f'exitax calibrate --model_dir={name} --measure={report.measure}',
    )
  return Verdict(
    outcome=Outcome.NEITHER.value,
    text=(
      f'Early exit does not pay for this model on this data: the best lossless way, {how}, is '
      f'{_quoted(report, SPECULATION, best.speed_up)} as fast as full depth, and a threshold of '
      f'{threshold.threshold:g}, which keeps {threshold.agreement:.1%} of the choices{_own_text(report)}, '
      f'{_quoted(report, DEFERRED, threshold.deferred)}. {_reason(report)}'
    ),
    command=f'{generate} --strategy=full',
  )


def _reason(report: AdviceReport) -> str:
  """What stands in the way: the exits' agreement, or what they cost."""
  best = report.best_speculation
  exit_facts = next(item for item in report.exits if item.layer == best.layer)
  index = report.exits.index(exit_facts)
  costs = report.draft_costs
  round_ = costs['rounds'][index][best.num_drafts - 1] / costs['plain']
  most = best.num_drafts + 1
  perfect = most / round_
  if perfect < report.worthwhile:
    return (
      f'Even an exit that always agreed would give {perfect:.2f}x at most: such a round takes as long as '
      f'{round_:.1f} steps here and gains {most} tokens at most. A smaller vocabulary, earlier exits or more '
      'layers would make drafts cheaper.'
    )
  return (
    f'The exit after layer {best.layer} agrees with the final layer on {exit_facts.own_agreement:.0%} of '
    f'tokens; if it always did, this would be {perfect:.2f}x. Train it more: higher '
    '`exit_weights`, LayerSkip dropout, more steps.'
  )


def _own_text(report: AdviceReport) -> str:
  """How much of the text stays, which falls faster: once texts part they stay apart."""
  check = report.check(DEFERRED)
  return '' if check is None else f' ({check.same_text:.0%} of the text it then writes is the same)'


def _threshold_aside(report: AdviceReport, threshold: ThresholdSpeed) -> str:
  if _speed(report, DEFERRED, threshold.deferred) < report.worthwhile:
    return ''
  return (
    f' A threshold of {threshold.threshold:g} on {report.measure}, which keeps {threshold.agreement:.1%} of the '
    f'choices{_own_text(report)}, is {_quoted(report, DEFERRED, threshold.deferred)}; '
    '`exitax calibrate` certifies one.'
  )


def _speed(report: AdviceReport, name: str, predicted: float) -> float:
  check = report.check(name)
  return predicted if check is None else check.measured


def _quoted(report: AdviceReport, name: str, predicted: float) -> str:
  check = report.check(name)
  if check is None:
    return f'{predicted:.2f}x (predicted)'
  return f'{check.measured:.2f}x (measured; predicted {predicted:.2f}x)'
