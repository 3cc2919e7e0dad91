"""The floors of the house: imports only point down, and each folder knows only what it may.

The checker reads source with `ast`, so it sees imports inside functions and under `TYPE_CHECKING`
too. It is itself tested on small trees that break one rule each. What reading cannot show (that the
pure folders really load without gin or grain) is tried in a process where those are blocked.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FLOORS = {
  'errors': 0,
  'parallel': 1,
  'data': 1,
  'layers': 2,
  'models': 3,
  'checkpoint': 4,
  'objectives': 4,
  'decode': 4,
  'training': 5,
  'rl': 5,
  'swarm': 5,
  'evaluate': 5,
  'serve': 5,
  'convert': 5,
  'planning': 5,
  'language_model': 5,
  'commands': 6,
}
# The front door and `python -m exitax` stand outside the house and may enter by any floor.
OUTSIDE = {'__init__', '__main__'}
# Learning by reinforcement trains: it uses the optimizer and the train state. A plan compiles the
# step that training runs.
SAME_FLOOR_ALLOWED = {('rl', 'training'), ('planning', 'training')}
# These import with jax, flax and optax alone, on a host that has nothing else.
PURE = {'parallel', 'layers', 'models', 'objectives', 'decode'}
PURE_LIBRARIES = {'jax', 'jaxlib', 'flax', 'optax', 'numpy'}
# One folder each knows these libraries.
ONLY_IMPORTER = {'gin': 'commands', 'orbax': 'checkpoint'}
# Layers and models name logical axes; the mesh they land on is somebody else's business.
MESH_MODULES = ('jax.sharding', 'exitax.parallel.mesh', 'exitax.parallel.sharding')
MESH_FREE = {'layers', 'models'}
NETWORK = {'socket', 'socketserver', 'http', 'urllib', 'asyncio', 'ssl'}
NETWORK_FREE = {'layers', 'models', 'objectives', 'decode', 'data'}
BLOCKED = (
  'gin',
  'grain',
  'orbax',
  'tokenizers',
  'tensorflow_datasets',
  'array_record',
  'tensorboardX',
  'matplotlib',
  'rich',
  'transformers',
  'torch',
)


@dataclass(frozen=True)
class Import:
  """One imported module, as `exitax.layers.norm`, and where it is written."""

  module: str
  file: Path
  line: int

  @property
  def library(self) -> str:
    return self.module.partition('.')[0]

  @property
  def folder(self) -> str:
    """Folder (or top-level file) of exitax that is imported, '' for the front door itself."""
    return [*self.module.split('.'), ''][1]


def imports_of(file: Path, package: Path) -> Iterator[Import]:
  """Yields every import in `file`, relative ones and `import_module('...')` resolved."""
  relative = file.relative_to(package.parent)
  parents = relative.parent.parts
  for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'), filename=str(file))):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield Import(alias.name, relative, node.lineno)
    elif isinstance(node, ast.ImportFrom):
      above = parents[: len(parents) - node.level + 1] if node.level else ()
      base = '.'.join([*above, *([node.module] if node.module else [])])
      if base.count('.'):
        yield Import(base, relative, node.lineno)
      if not base.count('.') or base == 'exitax.parallel':
        # `from exitax import layers`, `from jax import sharding`: the name may be a module.
        for alias in node.names:
          yield Import(f'{base}.{alias.name}', relative, node.lineno)
    elif isinstance(node, ast.Call) and _names_a_module(node):
      yield Import(node.args[0].value, relative, node.lineno)


def _names_a_module(call: ast.Call) -> bool:
  name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
  first = call.args[0] if call.args else None
  is_text = isinstance(first, ast.Constant) and isinstance(first.value, str)
  return name in ('import_module', '__import__') and is_text and not first.value.startswith('.')


def broken_rules(package: Path) -> list[str]:
  """Returns one line per import in the tree `package` that breaks the floors, [] if none does."""
  problems = []
  for file in sorted(package.rglob('*.py')):
    parts = file.relative_to(package).parts
    folder = parts[0] if len(parts) > 1 else Path(parts[0]).stem
    if folder not in FLOORS and folder not in OUTSIDE:
      problems.append(f'exitax/{"/".join(parts)}: {folder} has no floor: give it one in FLOORS')
      continue
    for imported in imports_of(file, package):
      problem = _problem(folder, imported)
      if problem:
        problems.append(f'{imported.file.as_posix()}:{imported.line}: {problem}')
  return problems


def _problem(folder: str, imported: Import) -> str:
  owner = ONLY_IMPORTER.get(imported.library)
  if owner and folder != owner:
    return f'{imported.library} may be imported by {owner}/ only'
  if folder in MESH_FREE and imported.module.startswith(MESH_MODULES):
    return f'{folder}/ names logical axes only, and must not import {imported.module}'
  if folder in NETWORK_FREE and imported.library in NETWORK:
    return f'{folder}/ must not know the network ({imported.library})'
  if imported.library == 'exitax':
    return _floor_problem(folder, imported)
  if folder in PURE and imported.library not in PURE_LIBRARIES | set(sys.stdlib_module_names):
    return f'{folder}/ imports with jax, flax, optax alone, and must not import {imported.module}'
  return ''


def _floor_problem(folder: str, imported: Import) -> str:
  target = imported.folder
  if folder in OUTSIDE or target == folder:
    return ''
  if target not in FLOORS:
    return f'{folder}/ must not import the front door ({imported.module})'
  here, there = FLOORS[folder], FLOORS[target]
  if here < there:
    return f'{folder}/ (floor {here}) imports upwards: {target}/ (floor {there})'
  if here == there and (folder, target) not in SAME_FLOOR_ALLOWED:
    return f'{folder}/ and {target}/ share floor {here} and must not import each other'
  return ''


def test_the_house_keeps_its_floors(repository: Path):
  assert broken_rules(repository / 'exitax') == []


def test_every_folder_but_the_launchers_lists_its_public_names(repository: Path):
  package = repository / 'exitax'
  folders = [f for f in package.iterdir() if any(f.glob('*.py')) and f.name != 'commands']
  assert folders
  for folder in folders:
    front = folder / '__init__.py'
    assert front.is_file(), f'{folder.name}/ has no __init__.py'
    tree = ast.parse(front.read_text(encoding='utf-8'))
    assigned = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    assert '__all__' in assigned, f'{folder.name}/__init__.py lists no public names'


@pytest.mark.parametrize(
  ('file', 'source', 'expected'),
  [
    (
      'layers/a.py',
      'from exitax.models import config',
      'layers/ (floor 2) imports upwards: models',
    ),
    ('parallel/a.py', 'import exitax.layers.norm', 'parallel/ (floor 1) imports upwards: layers'),
    ('data/a.py', 'from exitax import parallel', 'data/ and parallel/ share floor 1'),
    (
      'decode/a.py',
      'from ..models import b\nfrom ..evaluate import c',
      'imports upwards: evaluate',
    ),
    ('decode/a.py', 'from exitax.checkpoint import load', 'decode/ and checkpoint/ share floor 4'),
    ('swarm/a.py', 'from exitax.training import loop', 'swarm/ and training/ share floor 5'),
    ('training/a.py', 'from exitax.rl import loop', 'training/ and rl/ share floor 5'),
    ('training/a.py', 'def f():\n  import gin', 'gin may be imported by commands/ only'),
    ('training/a.py', 'import orbax.checkpoint as ocp', 'orbax may be imported by checkpoint/'),
    ('training/a.py', 'from orbax import checkpoint', 'orbax may be imported by checkpoint/'),
    ('decode/a.py', 'from grain import python', 'decode/ imports with jax, flax, optax alone'),
    ('decode/a.py', 'import socket', 'decode/ must not know the network'),
    ('models/a.py', 'from jax.sharding import Mesh', 'models/ names logical axes only'),
    ('models/a.py', 'from jax import sharding', 'models/ names logical axes only'),
    ('layers/a.py', 'from exitax.parallel import mesh', 'layers/ names logical axes only'),
    ('layers/a.py', 'import exitax', 'layers/ must not import the front door'),
    ('layers/a.py', 'from exitax import load', 'layers/ must not import the front door'),
    ('data/a.py', "import_module('exitax.training')", 'data/ (floor 1) imports upwards: training'),
    ('utils/a.py', '', 'utils has no floor'),
    ('utils.py', '', 'utils has no floor'),
    (
      'errors.py',
      'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from exitax.data import Batch',
      'errors/ (floor 0) imports upwards: data',
    ),
  ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, source: str, expected: str):
  _write_tree(tmp_path, file, source)
  problems = broken_rules(tmp_path / 'exitax')
  assert len(problems) == 1
  assert expected in problems[0]
  assert file in problems[0]


@pytest.mark.parametrize(
  ('file', 'source'),
  [
    ('commands/a.py', 'import gin\nfrom exitax.training import loop\nfrom exitax import decode'),
    ('checkpoint/a.py', 'import orbax.checkpoint.v1 as ocp\nfrom exitax.errors import UserError'),
    ('rl/a.py', 'from exitax.training import optimizer\nfrom exitax.decode import loop'),
    ('swarm/a.py', 'import asyncio\nfrom ..decode import loop'),
    ('layers/a.py', 'import jax\nimport flax.linen as nn\nfrom exitax.parallel import constrain'),
    (
      'layers/a.py',
      'from exitax.layers import norm\nfrom . import norm\nfrom .norm import RMSNorm',
    ),
    ('__init__.py', 'from exitax.commands import main'),
    ('__main__.py', 'from exitax.commands.main import main'),
  ],
)
def test_what_the_house_allows_is_allowed(tmp_path: Path, file: str, source: str):
  _write_tree(tmp_path, file, source)
  assert broken_rules(tmp_path / 'exitax') == []


def _write_tree(root: Path, file: str, source: str) -> None:
  path = root / 'exitax' / file
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(source)


@pytest.mark.processes
def test_the_pure_folders_import_with_jax_flax_and_optax_alone(
  repository: Path, subprocess_env: dict[str, str]
):
  modules = [
    '.'.join(file.relative_to(repository).with_suffix('').parts).removesuffix('.__init__')
    for folder in sorted(PURE)
    for file in sorted((repository / 'exitax' / folder).rglob('*.py'))
  ]
  assert modules
  _run_blocked(f'for name in {modules!r}: importlib.import_module(name)', subprocess_env)


@pytest.mark.processes
def test_the_blocker_blocks(subprocess_env: dict[str, str]):
  with pytest.raises(subprocess.CalledProcessError) as raised:
    _run_blocked('import grain', subprocess_env)
  assert 'blocked: grain' in raised.value.stderr


@pytest.mark.processes
def test_the_front_door_is_lazy(subprocess_env: dict[str, str]):
  code = (
    "import sys, exitax; print([m for m in ('jax', 'flax', 'gin', 'grain') if m in sys.modules])"
  )
  run = subprocess.run(
    [sys.executable, '-c', code], env=subprocess_env, capture_output=True, text=True, check=True
  )
  assert run.stdout.strip() == '[]'


def _run_blocked(code: str, env: dict[str, str]) -> None:
  """Runs `code` where nothing but jax, flax and optax may use the `BLOCKED` libraries."""
  program = f"""
import importlib, importlib.abc, sys
# flax brings rich and Orbax: it may have loaded them, exitax may not find them.
import flax.linen, flax.struct, jax, optax
for name in list(sys.modules):
  if name.partition('.')[0] in {BLOCKED!r}:
    del sys.modules[name]

class Refuse(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in {BLOCKED!r}:
      raise ModuleNotFoundError('blocked: ' + name)

sys.meta_path.insert(0, Refuse())
{code}
"""
  subprocess.run(
    [sys.executable, '-c', program], env=env, capture_output=True, text=True, check=True
  )
