"""How every module declares a parameter: an array with a logical name for each axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer


def parameter(
  module: nn.Module, name: str, init: Initializer, *, shape: Sequence[int], axes: Sequence[str]
) -> jax.Array:
  """The module's float32 parameter `name` of this shape, `axes` naming its dimensions."""
  partitioned = nn.with_logical_partitioning(init, tuple(axes))
  # Inside `apply` and `init` Linen hands out the array itself, whatever the annotation says.
  return cast(jax.Array, module.param(name, partitioned, tuple(shape)))
