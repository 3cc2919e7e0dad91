"""Being told to stop: SIGTERM and Ctrl-C become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
  """While entered, the first SIGTERM or SIGINT sets `requested`; a second one acts as usual.

  Outside the main thread (a notebook's executor) signals cannot be caught; nothing is changed then.
  """

  def __init__(self) -> None:
    self.requested = False
    self._previous: dict[int, object] = {}

  def __enter__(self) -> StopSignal:
    if threading.current_thread() is threading.main_thread():
      self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._restore()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
    self._previous = {}


class AgreedStop:
  """A `StopSignal` of any process, seen by all of them before the same step.

  Every step sends the flags of all processes over the devices, and reads what was sent one step
  earlier: by then it is there, so that steps are still dispatched ahead. With one process its own
  flag counts at once.

  Args:
    signal: this process's.
    mesh: all devices of the run.
  """

  def __init__(self, signal: StopSignal, mesh: Mesh) -> None:
    self._signal = signal
    self._alone = jax.process_count() == 1
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    self._any = jax.jit(lambda flags: jnp.max(flags, keepdims=True), out_shardings=whole)
    self._sent: jax.Array | None = None

  def reached(self) -> bool:
    """Whether to stop before the step that comes; to be called once before every step."""
    if self._alone:
      return self._signal.requested
    earlier = self._sent
    self._sent = self._any(self._own_flags())
    return earlier is not None and bool(np.asarray(earlier.addressable_data(0))[0])

  def _own_flags(self) -> jax.Array:
    flag = np.full((1,), self._signal.requested, np.int32)
    shape = (self._sharding.mesh.size,)
    return jax.make_array_from_callback(shape, self._sharding, lambda index: flag)
