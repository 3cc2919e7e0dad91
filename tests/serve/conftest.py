"""A tiny random model that exits with variety, as a service and behind a real port."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from exitax.checkpoint import LoadedModel
from exitax.data import ByteTokenizer
from exitax.decode import prepare_params
from exitax.models import ExitConfig, ExitLM, ModelConfig
from exitax.serve import ServeConfig, Service, address_of, bind, build_service, create_app
from exitax.serve.server import DrainingServer


@dataclasses.dataclass(frozen=True)
class Served:
  """A server on a loopback port.

  Attributes:
    url: its address.
    service: what answers there.
  """

  url: str
  service: Service

  def wait_idle(self, seconds: float = 10.0) -> bool:
    """Whether the engine has nothing left to do within that time."""
    end = time.monotonic() + seconds
    while not self.service.engine.idle:
      if time.monotonic() > end:
        return False
      time.sleep(0.01)
    return True


@pytest.fixture(scope='session')
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
  """Bytes in, bytes out; exits after layers 1 and 2 of 3."""
  return _make_loaded(tmp_path_factory.mktemp('served') / 'tiny')


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., LoadedModel]:
  """Models that differ from the tiny one in some fields of their configuration."""
  return lambda **changes: _make_loaded(tmp_path / 'other', **changes)


def _make_loaded(directory: Path, **changes) -> LoadedModel:
  """A random model as if it had been trained in `directory`."""
  config = ModelConfig(
    vocab_size=264,
    num_layers=3,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=32,
    max_length=256,
    exits=(ExitConfig(layer=1), ExitConfig(layer=2)),
  )
  model = ExitLM(dataclasses.replace(config, **changes))
  # Larger weights make confident exits and varied text out of a random model.
  params = jax.tree.map(lambda x: x * 6, model.init(jax.random.key(1)))
  return LoadedModel(
    model=model,
    params=prepare_params(model, params),
    tokenizer=ByteTokenizer(),
    step=0,
    directory=directory,
  )


# The packaged one is longer than the tiny model's context.
THINK_TEMPLATE = 'prompt = "{thinkers}:{problem}"\nheader = "|{thinker}"\nanswer = "="\n'


@pytest.fixture(scope='session')
def make_service(
  loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Service]:
  """Builds a service on the tiny model; its engine is not started."""
  template = tmp_path_factory.mktemp('think') / 'think.toml'
  template.write_text(THINK_TEMPLATE)
  defaults = {'num_slots': 3, 'max_queue': 8, 'think_template': str(template)}

  def make(**settings) -> Service:
    return build_service(loaded, ServeConfig(**{**defaults, **settings}))

  return make


@pytest.fixture(scope='session')
def serving() -> Callable[..., contextlib.AbstractContextManager[Served]]:
  """Runs a service in threads of this process."""
  return _serving


@contextlib.contextmanager
def _serving(service: Service, *, api_key: str | None = None) -> Iterator[Served]:
  app = create_app(service, host='127.0.0.1', api_key=api_key)
  with bind('127.0.0.1', 0) as bound:
    url = address_of(bound)
    server = DrainingServer(app, engine=service.engine, drain_timeout=5)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
    service.engine.start()
    thread.start()
    while not server.started:
      time.sleep(0.01)
    try:
      yield Served(url, service)
    finally:
      server.handle_exit(0, None)
      thread.join(timeout=20)
      service.engine.stop()


@pytest.fixture(scope='module')
def served(make_service: Callable[..., Service]) -> Iterator[Served]:
  """One server for a file of tests."""
  with _serving(make_service()) as running:
    yield running
