"""What a person sees of a run: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Display(Protocol):
  """Shows messages and the metrics of a run."""

  def message(self, text: str) -> None:
    """Shows one line."""
    ...

  def begin(self, *, step: int, train_steps: int, depth_names: Sequence[str]) -> None:
    """The loop starts after `step`."""
    ...

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """New metrics of `step`."""
    ...

  def advance(self, step: int) -> None:
    """A step is done; no metrics yet."""
    ...

  def end(self) -> None:
    """The loop is over."""
    ...


class QuietDisplay:
  """Shows nothing: for tests and notebooks that draw their own."""

  def message(self, text: str) -> None:
    """Nothing."""

  def begin(self, *, step: int, train_steps: int, depth_names: Sequence[str]) -> None:
    """Nothing."""

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Nothing."""

  def advance(self, step: int) -> None:
    """Nothing."""

  def end(self) -> None:
    """Nothing."""


class ConsoleDisplay:
  """A rich progress bar on a terminal; one aligned line per report when piped.

  Args:
    console: where to write; standard output by default.
  """

  def __init__(self, console: Console | None = None) -> None:
    self._console = console or Console(highlight=False, soft_wrap=True)
    self._progress: Progress | None = None
    self._task = None
    self._depth_names: Sequence[str] = ()
    self._train_steps = 0

  def __enter__(self) -> ConsoleDisplay:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.end()

  def message(self, text: str) -> None:
    """Shows one line above the bar."""
    self._console.print(text, markup=False)

  def begin(self, *, step: int, train_steps: int, depth_names: Sequence[str]) -> None:
    """Opens the bar on a terminal."""
    self._depth_names, self._train_steps = depth_names, train_steps
    if not self._console.is_terminal:
      return
    self._progress = Progress(
      TextColumn('[bold]train'),
      BarColumn(bar_width=24),
      TextColumn('{task.completed}/{task.total}'),
      _LossColumn(depth_names),
      TimeRemainingColumn(),
      console=self._console,
    )
    self._progress.start()
    self._task = self._progress.add_task('train', total=train_steps, completed=step, metrics={})

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows losses, speed and time left."""
    if self._progress is not None and self._task is not None:
      self._progress.update(self._task, completed=step, metrics=dict(metrics))
    else:
      self._console.print(self._line(step, metrics), markup=False)

  def advance(self, step: int) -> None:
    """Moves the bar."""
    if self._progress is not None and self._task is not None:
      self._progress.update(self._task, completed=step)

  def end(self) -> None:
    """Closes the bar."""
    if self._progress is not None:
      self._progress.stop()
      self._progress = None

  def _line(self, step: int, metrics: Mapping[str, float]) -> str:
    left = metrics.get('step_seconds', 0.0) * (self._train_steps - step)
    return f'step {step:>6}/{self._train_steps}  {_losses(self._depth_names, metrics)}' + (
      f'  {_speed(metrics)}  left {int(left) // 60}:{int(left) % 60:02d}'
      if 'tokens_per_second' in metrics
      else ''
    )


class _LossColumn(ProgressColumn):
  """Loss per exit and tokens per second beside the bar."""

  def __init__(self, depth_names: Sequence[str]) -> None:
    super().__init__()
    self._depth_names = depth_names

  def render(self, task: Task) -> Text:
    metrics = task.fields.get('metrics', {})
    if not metrics:
      return Text('compiling', style='dim')
    text = Text(_losses(self._depth_names, metrics), style='cyan')
    return text.append('  ' + _speed(metrics), style='green')


def _losses(depth_names: Sequence[str], metrics: Mapping[str, float]) -> str:
  parts = (f'{name} {metrics[f"train/{name}/nll"]:6.3f}' for name in depth_names)
  return 'loss ' + '  '.join(parts)


def _speed(metrics: Mapping[str, float]) -> str:
  return f'{metrics.get("tokens_per_second", 0.0):,.0f} tok/s'
