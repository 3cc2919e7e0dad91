from __future__ import annotations

import subprocess
import sys

import pytest

from exitax.errors import UserError
from exitax.parallel import COLLECTIVES_IN_ORDER, emulate_devices

PROGRAM = """
import os, jax
from exitax.parallel import emulate_devices
emulate_devices(3)
emulate_devices(3)
print(len(jax.devices()), jax.devices()[0].platform, os.environ['XLA_FLAGS'])
"""


def test_devices_are_emulated_and_keep_the_order_of_collectives(subprocess_env):
  environment = {**subprocess_env, 'XLA_FLAGS': '--xla_cpu_enable_fast_math=false'}
  run = subprocess.run(
    [sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, check=True
  )
  flags = f'--xla_cpu_enable_fast_math=false {COLLECTIVES_IN_ORDER}'
  assert run.stdout.strip() == f'3 cpu {flags}'


def test_no_device_is_refused():
  with pytest.raises(UserError, match='--emulate_devices=0 must be at least 1'):
    emulate_devices(0)
