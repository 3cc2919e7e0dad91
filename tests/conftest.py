"""One surrounding for every test: 8 CPU devices, a shared compile cache, no network, no screen.

Everything here happens before the first test module imports jax, because the number of devices and
the caches cannot change once a backend has started. What is set through the environment also
reaches the processes that tests start; `subprocess_env` is that environment, ready to pass on.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
MANY_MEMORY_MAPS = 15_000


def _test_cache() -> Path:
  """Folder that outlives the session; compiled programs are reused by workers and by later runs."""
  return Path(os.environ.get('EXITAX_TEST_CACHE', REPOSITORY / '.cache' / 'tests')).resolve()


def _is_worker() -> bool:
  return 'PYTEST_XDIST_WORKER' in os.environ


def _xla_flags() -> str:
  wanted = [
    # Eight devices on two busy cores can keep a collective waiting longer than XLA's 40 seconds,
    # after which it would end the process.
    '--xla_cpu_collective_call_terminate_timeout_seconds=300',
    # As `exitax.parallel.emulate_devices`: otherwise devices can wait for each other forever.
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
    # Most of the tests' time is LLVM's, for programs that run once: a third of it less. With
    # XLA_FLAGS=--xla_backend_optimization_level=3 tests run what users run; benchmarks always do.
    '--xla_backend_optimization_level=0',
  ]
  flags = os.environ.get('XLA_FLAGS', '').split()
  given = {flag.partition('=')[0] for flag in flags}
  return ' '.join([*flags, *(flag for flag in wanted if flag.partition('=')[0] not in given)])


def _set_environment() -> None:
  jax_cache = _test_cache() / 'jax'
  jax_cache.mkdir(parents=True, exist_ok=True)
  os.environ.update(
    {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(jax_cache),
      # Below this a program compiles as fast as it is read back.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
      'XLA_FLAGS': _xla_flags(),
      'MPLBACKEND': 'Agg',
      'TOKENIZERS_PARALLELISM': 'false',
      'HF_HUB_OFFLINE': '1',
      # The workers share the cores already.
      'OMP_NUM_THREADS': '1',
    }
  )
  for name in ('NO_COLOR', 'FORCE_COLOR', 'COLUMNS', 'EXITAX_LOG'):
    os.environ.pop(name, None)
  if not _is_worker():
    # The workers inherit it: tokenizers and corpora are made once in a session, never taken from
    # an earlier one, so that the code which makes them is always run.
    os.environ['EXITAX_CACHE_DIR'] = tempfile.mkdtemp(prefix='exitax-tests-')


_set_environment()

import jax  # noqa: E402  (after the environment is set)

jax.config.update('jax_num_cpu_devices', NUM_DEVICES)


def pytest_sessionfinish(session: pytest.Session) -> None:
  """Removes what only this session used."""
  if not _is_worker():
    shutil.rmtree(os.environ['EXITAX_CACHE_DIR'], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Starts files that hold a slow test first, so that no worker is left alone at the end."""
  slow_files = {item.path for item in items if item.get_closest_marker('slow')}
  items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(scope='module', autouse=True)
def few_memory_maps() -> Iterator[None]:
  """Drops compiled programs after a file that leaves too many of them.

  XLA maps memory for every program it compiles, and Linux ends a process that exceeds its limit of
  maps (65,530 by default) with a segmentation fault somewhere else. Programs come back from the
  persistent cache.
  """
  yield
  if _num_memory_maps() > MANY_MEMORY_MAPS:
    jax.clear_caches()
    gc.collect()


def _num_memory_maps() -> int:
  try:
    return Path('/proc/self/maps').read_bytes().count(b'\n')
  except OSError:  # Not Linux.
    return 0


@pytest.fixture(scope='session')
def repository() -> Path:
  """Root of the checkout."""
  return REPOSITORY


@pytest.fixture
def subprocess_env() -> dict[str, str]:
  """Environment for a program that a test starts: finds the package, sees as many devices."""
  environment = dict(os.environ)
  paths = [str(REPOSITORY), environment.get('PYTHONPATH', '')]
  environment['PYTHONPATH'] = os.pathsep.join(path for path in paths if path)
  environment['JAX_NUM_CPU_DEVICES'] = str(NUM_DEVICES)
  return environment


@pytest.fixture
def x64() -> Iterator[None]:
  """Float64 arrays, for comparison with NumPy oracles."""
  with jax.enable_x64(True):
    yield
