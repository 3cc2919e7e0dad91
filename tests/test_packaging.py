"""What surrounds the code agrees with itself: requirements, Makefile, licence, citation, gin files."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

PAPERS = {'2312.04916', '2505.11107', '2506.15050', '2209.01188', '2312.08361'}
# Split, so that this file does not hold what it looks for.
FORBIDDEN = {
  'a path of one machine': r'(?<![\w.])/(ro'
  + r'ot|wo'
  + r'rk|(home|Users)/(?!someone|you)\w+|opt)/',
  'a package index address': r'https?://[\w.-]*(py'
  + r'pi|python'
  + r'hosted|files\.py|download\.py'
  + r'torch)',
  'an index option': r'(?m)^\s*--(extra-)?index' + r'-url|--find' + r'-links',
}
LOCK_FILES = {'uv.lock', 'poetry.lock', 'Pipfile.lock', 'pdm.lock', 'pylock.toml', 'conda-lock.yml'}


@pytest.fixture(scope='module')
def project(repository: Path) -> dict:
  """The parsed pyproject.toml."""
  return tomllib.loads((repository / 'pyproject.toml').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def tracked(repository: Path) -> list[Path]:
  """Files of the repository: those git tracks, or in an export without .git all that is there."""
  if (repository / '.git').exists() and shutil.which('git'):
    run = subprocess.run(
      ['git', 'ls-files', '-z'], cwd=repository, capture_output=True, text=True, check=True
    )
    names = [name for name in run.stdout.split('\0') if name]
  else:
    skip = {'.venv', '.cache', 'runs', 'site', '__pycache__'}
    files = (f.relative_to(repository) for f in repository.rglob('*') if f.is_file())
    names = [str(f) for f in files if not skip & set(f.parts)]
  return [repository / name for name in names if (repository / name).is_file()]


def forbidden_in(text: str) -> list[str]:
  """Returns what `text` holds that a repository must not, as 'kind: excerpt'."""
  found = ((kind, re.search(pattern, text)) for kind, pattern in FORBIDDEN.items())
  return [f'{kind}: {match.group()}' for kind, match in found if match]


def parse_requirements(file: Path) -> set[Requirement]:
  """Returns the requirements in `file` and in the files it includes with -r."""
  found = set()
  for line in file.read_text(encoding='utf-8').splitlines():
    line = line.partition('#')[0].strip()
    if line.startswith('-r '):
      found |= parse_requirements(file.parent / line[3:].strip())
    elif line:
      found.add(Requirement(line))
  return found


def test_no_tracked_file_names_a_machine_or_an_index(tracked: list[Path]):
  problems = []
  for file in tracked:
    try:
      text = file.read_text(encoding='utf-8')
    except UnicodeDecodeError:
      continue
    problems += [f'{file.name}: {problem}' for problem in forbidden_in(text)]
  assert tracked
  assert problems == []


@pytest.mark.parametrize(
  'text',
  [
    'see /ro' + 'ot/.cache/x',
    "open('/wo" + "rk/main/a')",
    'cd /home/' + 'ann/x',
    'https://py' + 'pi.org/simple',
    'https://download.py' + 'torch.org/whl/cpu',
    'torch --extra-index' + '-url x\n--index' + '-url y',
  ],
)
def test_a_forbidden_text_is_found(text: str):
  assert forbidden_in(text)


def test_an_ordinary_text_is_not_forbidden():
  assert not forbidden_in(
    'runs/quickstart, $HOME/x, https://arxiv.org/abs/2312.04916, a/wo' + 'rk/b'
  )


def test_no_lock_file_is_tracked(tracked: list[Path]):
  assert not LOCK_FILES & {file.name for file in tracked}


def test_requirements_mirror_the_project(repository: Path, project: dict):
  extras = project['project']['optional-dependencies']
  core = [*project['project']['dependencies'], *extras['tfds'], *extras['serve']]
  assert parse_requirements(repository / 'requirements.txt') == {Requirement(r) for r in core}
  everything = [*core, *(r for extra in extras.values() for r in extra)]
  assert parse_requirements(repository / 'requirements-dev.txt') == {
    Requirement(r) for r in everything
  }


@pytest.mark.parametrize(
  ('python', 'jax', 'flax'),
  [('3.11', '0.10.2', '0.12.8'), ('3.12', '0.12.0', '0.12.12'), ('3.13', '0.11.2', '0.12.10')],
)
def test_each_python_gets_the_jax_and_flax_made_for_it(
  project: dict, python: str, jax: str, flax: str
):
  wanted = [Requirement(r) for r in project['project']['dependencies']]
  here = [r for r in wanted if r.marker is None or r.marker.evaluate({'python_version': python})]
  names = [r.name for r in here]
  assert sorted(names) == sorted(set(names)), 'two requirements for one package'
  for name, version in (('jax', jax), ('flax', flax)):
    (requirement,) = (r for r in here if r.name == name)
    assert requirement.specifier.contains(version)


def test_the_withdrawn_flax_is_not_taken(project: dict):
  lines = [line for line in project['project']['dependencies'] if line.startswith('flax')]
  assert len(lines) == 2
  assert not any(Requirement(line).specifier.contains('0.12.11') for line in lines)


def test_the_installed_versions_are_the_required_ones(project: dict):
  for line in project['project']['dependencies']:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate():
      version = metadata.version(requirement.name)
      assert requirement.specifier.contains(version), f'{requirement} but {version} is installed'


def test_everything_the_package_imports_is_required(repository: Path, project: dict):
  modules = {'orbax-checkpoint': 'orbax', 'gin-config': 'gin', 'grain': 'grain'}
  extras = project['project']['optional-dependencies']
  optional = [r for name in ('tfds', 'serve', 'harness', 'bench') for r in extras[name]]
  lines = [*project['project']['dependencies'], *optional]
  names = {Requirement(line).name for line in lines}
  required = {modules.get(name, name.replace('-', '_')) for name in names}
  # jaxlib comes with jax, absl with gin's users grain and orbax.
  known = required | set(sys.stdlib_module_names) | {'exitax', 'jaxlib'}
  pattern = re.compile(r'^\s*(?:from|import)\s+([A-Za-z]\w*)', re.MULTILINE)
  found = {}
  for file in (repository / 'exitax').rglob('*.py'):
    code = re.sub(r'"""[\s\S]*?"""', '', file.read_text(encoding='utf-8'))
    found |= {name: file.name for name in pattern.findall(code) if name not in known}
  assert found == {}


def test_setuptools_takes_the_package_alone(repository: Path, project: dict):
  include = project['tool']['setuptools']['packages']['find']['include']
  folders = [folder.name for folder in repository.iterdir() if folder.is_dir()]
  taken = [name for name in folders if any(fnmatch.fnmatch(name, p) for p in include)]
  assert [name for name in taken if not name.endswith('.egg-info')] == ['exitax']


def test_the_gin_folder_does_not_shadow_the_gin_package(repository: Path):
  assert not list((repository / 'gin').rglob('*.py'))


def test_a_wheel_carries_every_gin_file(repository: Path, project: dict):
  carried = project['tool']['setuptools']['data-files']
  patterns = [pattern for group in carried.values() for pattern in group]
  matched = {file for pattern in patterns for file in repository.glob(pattern)}
  assert set((repository / 'gin').rglob('*.gin')) == matched
  for target, group in carried.items():
    folder = target.removeprefix('share/exitax/')
    assert group == [f'{folder}/*.gin'], 'the folders keep their names in the wheel'


def test_the_licence_is_apache(repository: Path, project: dict):
  text = (repository / 'LICENSE').read_text(encoding='utf-8')
  assert 'Apache License' in text
  assert 'END OF TERMS AND CONDITIONS' in text
  assert project['project']['license'] == 'Apache-2.0'


def test_the_citation_names_the_papers(repository: Path, project: dict):
  citation = yaml.safe_load((repository / 'CITATION.cff').read_text(encoding='utf-8'))
  assert citation['cff-version'] == '1.2.0'
  assert citation['version'] == project['project']['version']
  assert citation['license'] == 'Apache-2.0'
  cited = {i['value'] for r in citation['references'] for i in r['identifiers']}
  assert cited == {f'arXiv:{paper}' for paper in PAPERS}
  assert all(r['authors'] and r['title'] for r in citation['references'])


def test_the_changelog_knows_this_version(repository: Path, project: dict):
  headings = re.findall(
    r'^## (.+)$', (repository / 'CHANGELOG.md').read_text('utf-8'), re.MULTILINE
  )
  assert headings[0].startswith(('Unreleased', project['project']['version']))


def test_ci_runs_the_tests(repository: Path):
  script = repository / '.ci' / 'run'
  assert script.stat().st_mode & stat.S_IXUSR
  assert 'make test' in script.read_text(encoding='utf-8')
  subprocess.run(['bash', '-n', str(script)], check=True)


def test_hooks_use_the_tools_of_the_environment(repository: Path):
  config = yaml.safe_load((repository / '.pre-commit-config.yaml').read_text(encoding='utf-8'))
  assert {repo['repo'] for repo in config['repos']} == {'local'}
  hooks = [hook for repo in config['repos'] for hook in repo['hooks']]
  assert all(hook['entry'].startswith('.venv/bin/') for hook in hooks)
  assert {'ruff-check', 'ruff-format', 'pyright', 'codespell'} <= {hook['id'] for hook in hooks}


needs_make = pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')


@needs_make
def test_make_alone_lists_every_target(repository: Path):
  run = subprocess.run(
    ['make'],
    cwd=repository,
    env={'PATH': os.environ['PATH']},
    capture_output=True,
    text=True,
    check=True,
  )
  listed = re.findall(r'^  make ([\w-]+)', run.stdout, re.MULTILINE)
  phony = re.search(r'^\.PHONY: (.+)$', (repository / 'Makefile').read_text('utf-8'), re.MULTILINE)
  assert listed == phony.group(1).split()
  assert {'install', 'install-dev', 'quickstart', 'test', 'lint', 'docs', 'bench'} <= set(listed)


@needs_make
def test_an_unsuitable_python_is_refused_in_words(repository: Path, tmp_path: Path):
  fake = tmp_path / 'python3.9'
  fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18 && exit\nexit 1\n')
  fake.chmod(0o755)
  venv = tmp_path / 'venv'
  run = subprocess.run(
    ['make', 'install', f'PYTHON={fake}', f'VENV={venv}'],
    cwd=repository,
    env={'PATH': os.environ['PATH']},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 2
  assert 'needs Python 3.11, 3.12 or 3.13, and found: Python 3.9.18' in run.stderr
  assert 'make install PYTHON=' in run.stderr
  assert not venv.exists()
