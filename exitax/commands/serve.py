r"""Serves a model over HTTP to OpenAI clients, with the exit depth of every token; a page at /.

  exitax serve --model_dir=runs/quickstart --threshold=0.8
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \
    -d '{"prompt": "def main(", "max_tokens": 32, "temperature": 0}'

Every setting is a field of ServeConfig in gin, and a flag that wins over it. Without --host only this
machine can ask. SIGTERM or Ctrl-C lets running answers finish; a second one does not. Needs
the extra `serve`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import sys
import time

import jax

from exitax import serve
from exitax.checkpoint import load_model
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.data import progress_bar
from exitax.errors import UserError
from exitax.parallel import MeshConfig, ShardingRules, format_bytes, make_mesh, use

API_KEY_VARIABLE = 'EXITAX_API_KEY'
# Packages of the extra `serve`, by the names they are imported under.
_EXTRA = ('fastapi', 'uvicorn', 'jinja2', 'prometheus_client')

gin_config.make_configurable(serve.ServeConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_checkpoint_flags(parser)
  network = parser.add_argument_group('network')
  network.add_argument('--host', help='address to bind to; 127.0.0.1, this machine, by default')
  network.add_argument('--port', type=int, help='8000 by default; 0 takes any that is free')
  network.add_argument(
    '--api_key', metavar='KEY', help=f'what clients must send; or set {API_KEY_VARIABLE}'
  )
  load = parser.add_argument_group('load')
  load.add_argument('--num_slots', type=int, metavar='N', help='texts at once; 8 by default')
  load.add_argument(
    '--max_thinkers',
    type=int,
    metavar='N',
    help='thinkers of a request at most; 8 by default, or as many as there are slots',
  )
  load.add_argument(
    '--capacity',
    type=int,
    metavar='N',
    help='tokens of prompt and answer together; 0, the default, is the context of the model',
  )
  load.add_argument('--max_queue', type=int, metavar='N', help='prompts that may wait; 64')
  for name, text in (
    ('queue_timeout', 'how long a prompt may wait; 30'),
    ('request_timeout', 'from arrival to the last token; 300'),
    ('drain_timeout', 'what running answers get when told to stop; 30'),
  ):
    load.add_argument(f'--{name}', type=float, metavar='SECONDS', help=text)
  load.add_argument(
    '--max_logprobs', type=int, metavar='N', help='alternatives per token to be asked for; 5'
  )
  load.add_argument(
    '--prefix_cache_bytes', type=int, metavar='N', help='kept of prompts seen before; 256 MiB'
  )
  exits = parser.add_argument_group('early exit')
  exits.add_argument(
    '--strategy', help='for requests that name none: full, deferred or speculative'
  )
  exits.add_argument(
    '--threshold',
    type=flag_groups.thresholds,
    metavar='T',
    help="for requests that name none; one number, one per exit (0.9,0.8), or 'certified': what "
    '`exitax calibrate` has certified where it applies, and no loss elsewhere',
  )
  exits.add_argument(
    '--confidence',
    metavar='NAME',
    help='max_prob (the default), margin, entropy, patience, cosine or classifier',
  )
  parser.add_argument('--weights', metavar='FORMAT', help='compute (the default) or int8')
  parser.add_argument('--kv_cache', metavar='FORMAT', help='compute (the default) or int8')
  parser.add_argument('--chat_template', metavar='FILE', help='a Jinja file')
  parser.add_argument(
    '--think_template', metavar='FILE', help='a TOML file with what thinkers are told'
  )
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Serves until told to stop."""
  flag_groups.start_jax(flags)
  if not flags.model_dir:
    raise UserError('serve needs a model: --model_dir=DIR, such as runs/quickstart')
  flag_groups.parse_gin(flags, bind_model_dir=False)
  config = gin_config.build(serve.ServeConfig)
  given = {
    field.name: getattr(flags, field.name)
    for field in dataclasses.fields(config)
    if getattr(flags, field.name) is not None
  }
  config = dataclasses.replace(config, **given)
  _check_extra()

  api_key = _api_key(flags)
  bound = serve.bind(config.host, config.port)
  with bound:
    start = time.perf_counter()
    mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingRules()
    service = serve.build_service(
      load_model(flags.model_dir, mesh=mesh, rules=rules, step=flags.step, exits=flags.exits),
      config,
      ambient=lambda: use(mesh, rules),
      progress=progress_bar,
    )
    app = serve.create_app(service, host=config.host, api_key=api_key)
    if not serve.is_loopback(config.host) and api_key is None:
      print('exitax: anybody who reaches this address may ask: set --api_key', file=sys.stderr)
    logging.getLogger('uvicorn.error').addHandler(logging.StreamHandler())
    serve.serve(
      app,
      bound,
      engine=service.engine,
      drain_timeout=config.drain_timeout,
      on_ready=lambda: _say_ready(
        service, serve.address_of(bound), seconds=time.perf_counter() - start
      ),
    )
  print('stopped')
  return 0


def _say_ready(service: serve.Service, address: str, *, seconds: float) -> None:
  occupancy = service.engine.occupancy()
  cache = format_bytes(service.engine.cache_bytes)
  print(
    f'{service.name}: {occupancy.slots} slots of {service.context} tokens ({cache} of cache), '
    f'strategies {", ".join(service.strategies.plans)}; ready after {seconds:.0f} s'
  )
  print(f'serving at {address} (page at /, OpenAI clients at /v1); Ctrl-C ends', flush=True)


def _api_key(flags: argparse.Namespace) -> str | None:
  name, key = '--api_key', flags.api_key
  if key is None:
    name, key = API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE)
  if key is not None:
    serve.check_usable(key, name=name)
  return key


def _check_extra() -> None:
  for name in _EXTRA:
    try:
      importlib.import_module(name)
    except ImportError:
      raise UserError(
        f"serve needs {name.replace('_', '-')}: pip install 'exitax[serve]'"
      ) from None
