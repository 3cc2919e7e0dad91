"""How decoding's programs are compiled: `jax.jit` with options chosen by platform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

# On the CPU, XLA hands products with a few rows to YNNPACK, which packs the weights anew on every
# call. Without it, 16 lanes through one layer's weights take 2.1 times as long as 1 lane, instead
# of 4.5 times (jax 0.10.2, [lanes, 512] x [512, 1408], float32).
_CPU_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': ''}


class DecodeJit:
  """A jitted function whose compiler options are chosen at its first call.

  Importing must not start a backend, and options are known to some versions of XLA only.
  """

  def __init__(
    self, fn: Callable[..., Any], *, static: Sequence[str], donated: Sequence[str]
  ) -> None:
    functools.update_wrapper(self, fn)
    self._fn, self._static, self._donated = fn, tuple(static), tuple(donated)

  @functools.cached_property
  def jitted(self) -> Any:
    """The function as `jax.jit` made it: for `lower`, cache sizes and the like."""
    return jax.jit(
      self._fn,
      static_argnames=self._static,
      donate_argnames=self._donated,
      compiler_options=_options(),
    )

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
      # Part of a larger program, which brings options of its own.
      return self._fn(*args, **kwargs)
    return self.jitted(*args, **kwargs)


def decode_jit(
  *, static: Sequence[str], donated: Sequence[str]
) -> Callable[[Callable[..., Any]], DecodeJit]:
  """Decorator: `jax.jit` for a function that runs layers on few tokens.

  Args:
    static: names of static arguments.
    donated: names of arguments whose buffers are reused.
  """
  return lambda fn: DecodeJit(fn, static=static, donated=donated)


@functools.cache
def _options() -> dict[str, str] | None:
  if jax.default_backend() != 'cpu':
    return None
  try:
    jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return _CPU_OPTIONS
