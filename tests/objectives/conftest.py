from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
  """Float64 arrays, for comparison with NumPy oracles."""
  with jax.enable_x64(True):
    yield
