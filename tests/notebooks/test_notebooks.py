"""Every notebook says the same as its paired .py file, and runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / 'notebooks').glob('*.ipynb'))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_script_are_a_pair(path: Path) -> None:
  notebook = nbformat.read(path, as_version=4)
  script = jupytext.read(path.with_suffix('.py'))
  assert cells(notebook) == cells(script), f'run: jupytext --sync notebooks/{path.name}'


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
  path: Path, tmp_path: Path, subprocess_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
  for name, value in subprocess_env.items():
    monkeypatch.setenv(name, value)
  # As on a user's machine: one device, and programs that run nearly as fast, though they compile in less time.
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=1')
  # A notebook shows its pictures; the other tests draw without a screen.
  monkeypatch.delenv('MPLBACKEND')
  notebook = nbformat.read(path, as_version=4)
  NotebookClient(notebook, timeout=600, resources={'metadata': {'path': tmp_path}}).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  assert any('image/png' in output.get('data', {}) for output in outputs)
  assert not [output for output in outputs if output.output_type == 'error']


def test_there_are_notebooks() -> None:
  assert NOTEBOOKS
