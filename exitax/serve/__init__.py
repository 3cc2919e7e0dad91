"""Serving: continuous batching over slots of one `DecodeState`, behind OpenAI's HTTP interface.

All but the settings needs the extra `serve` (FastAPI, uvicorn, Jinja2, prometheus-client), so names
are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from exitax.serve.app import create_app
  from exitax.serve.build import build_service
  from exitax.serve.config import ServeConfig
  from exitax.serve.engine import Engine
  from exitax.serve.security import check_usable, is_loopback
  from exitax.serve.server import address_of, bind, serve
  from exitax.serve.service import Service

# Public name -> module.
_NAMES = {
  # Settings.
  'ServeConfig': 'config',
  # A service: the engine and all that answers are made of.
  'Engine': 'engine',
  'Service': 'service',
  'build_service': 'build',
  # HTTP.
  'address_of': 'server',
  'bind': 'server',
  'check_usable': 'security',
  'create_app': 'app',
  'is_loopback': 'security',
  'serve': 'server',
}

__all__ = [
  'Engine',
  'ServeConfig',
  'Service',
  'address_of',
  'bind',
  'build_service',
  'check_usable',
  'create_app',
  'is_loopback',
  'serve',
]


def __getattr__(name: str) -> Any:
  if name in _NAMES:
    return getattr(importlib.import_module(f'exitax.serve.{_NAMES[name]}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
