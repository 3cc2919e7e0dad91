"""Slots that do not fit are told before they are made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from exitax.errors import UserError
from exitax.serve import memory


@pytest.mark.parametrize(
  ('free', 'num_slots', 'words'),
  [
    (None, 10**9, None),
    (16_000, 3, None),  # One row more takes prompts in.
    (16_000, 4, 'num_slots=4 of 7 tokens take .* are free: set --num_slots=3 at most, or a lower'),
    (7_999, 1, 'are free: set a lower --capacity'),
  ],
)
def test_what_fits(monkeypatch: pytest.MonkeyPatch, free: int | None, num_slots: int, words):
  monkeypatch.setattr(memory, 'free_memory', lambda device: free)

  def check() -> None:
    memory.check_slots(lambda: jnp.zeros(1000, jnp.float32), num_slots=num_slots, columns=7)

  if words is None:
    check()
    return
  with pytest.raises(UserError, match=words):
    check()


def test_free_memory_is_the_devices_or_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path):
  device = jax.devices()[0]
  (tmp_path / 'meminfo').write_text('MemTotal: 9 kB\nMemAvailable:   5 kB\n')
  monkeypatch.setattr(memory, '_MEMINFO', tmp_path / 'meminfo')
  assert memory.free_memory(device) == 5 * 1024
  monkeypatch.setattr(memory, '_MEMINFO', tmp_path / 'absent')
  assert memory.free_memory(device) is None
