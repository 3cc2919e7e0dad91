from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope='session')
def tiny() -> ModuleType:
  """The module beside this file that makes tiny runs; it is a program as well."""
  path = Path(__file__).with_name('tiny_run.py')
  spec = importlib.util.spec_from_file_location('tiny_run', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='session')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Folder of the text and its cache; model directories go elsewhere."""
  return tmp_path_factory.mktemp('tiny')
