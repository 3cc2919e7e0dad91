"""The profiler's window: a few steps of a run, as a trace that TensorBoard and Perfetto read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

PROFILE_FOLDER = 'profile'


class ProfilerWindow:
  """Traces the steps `[start, start + num_steps)`, or what of them a run takes.

  Args:
    model_dir: the trace goes below its folder `profile`.
    start: first step that is traced.
    num_steps: length of the window; 0 traces nothing.
  """

  def __init__(self, model_dir: Path, *, start: int, num_steps: int) -> None:
    self.directory = model_dir / PROFILE_FOLDER
    self._steps = range(start, start + num_steps)
    self._tracing = False

  def before(self, step: int) -> None:
    """Starts the trace if `step` (steps taken so far) lies in the window: also in its middle."""
    if step in self._steps and not self._tracing:
      jax.profiler.start_trace(str(self.directory))
      self._tracing = True

  def after(self, step: int, results: Any) -> bool:
    """Ends the trace if `step` steps are past the window; True if it was written just now.

    Args:
      step: steps taken so far.
      results: arrays of the last step; waited for, since steps run behind the program.
    """
    if not self._tracing or step in self._steps:
      return False
    jax.block_until_ready(results)
    self.close()
    return True

  def close(self) -> None:
    """Writes what there is, when a run ends within the window."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
