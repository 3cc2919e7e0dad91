"""Several thinkers from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from exitax.commands.think import Board
from exitax.data import ThinkTemplate
from exitax.decode import StopReason
from exitax.errors import UserError
from exitax.language_model import ANSWER, ThoughtEvent
from tests.commands.conftest import RunCommand

SHORT = 'prompt = "{thinkers}:{problem}"\nheader = "|{thinker}"\nanswer = "="\n'


@pytest.fixture
def template(tmp_path: Path) -> Path:
  """The packaged one is longer than the small model's context."""
  path = tmp_path / 'short.toml'
  path.write_text(SHORT)
  return path


def test_thinkers_and_their_answer(exitax: RunCommand, trained: Path, template: Path):
  ask = (
    'think',
    f'--model_dir={trained}',
    '--prompt=w1 {x}',
    f'--template={template}',
    '--thinkers=2',
  )
  ask = (*ask, '--tokens=5', '--answer_tokens=4', '--temperature=1')
  done = exitax(*ask, '--json')
  assert (done.status, done.err) == (0, '')
  texts = [json.loads(line) for line in done.out.splitlines()]
  assert [text['thinker'] for text in texts] == [1, 2, None]
  assert [len(text['tokens']) for text in texts] == [5, 5, 4]
  assert texts[0]['tokens'] != texts[1]['tokens']
  assert {text['stop_reason'] for text in texts} == {'budget'}
  again = exitax(*ask, '--json')
  assert again.out == done.out  # The same seed.
  early = exitax(*ask, '--json', '--threshold=0')
  assert {
    layer for line in early.out.splitlines() for layer in json.loads(line)['exit_layers']
  } == {1}
  plain = exitax(*ask, '--answer_tokens=0', '--visibility=none', '--positions=rotated')
  assert plain.status == 0
  assert plain.out.startswith('Thinker 1: ')
  assert 'Thinker 2: ' in plain.out and 'Answer' not in plain.out


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--thinkers=0'], 'thinkers=0 must be at least 1'),
    (['--tokens=0'], 'max_new_tokens=0 must be at least 1'),
    (['--visibility=some'], "visibility='some' is not known: choose full, strict"),
    (['--positions=anywhere'], "positions='anywhere'"),
    (['--slot_width=4'], 'slot_width=4 is below the 7 tokens'),
    (['--tokens=40'], 'exceed the context of 64: ask for fewer tokens or thinkers'),
    (['--prompt=again'], '2 problems: a group thinks about one'),
    (['--template=nowhere.toml'], 'template=nowhere.toml cannot be read'),
    (['--threshold=2'], 'threshold'),
  ],
)
def test_bad_input_is_one_line(
  exitax: RunCommand, trained: Path, template: Path, flags: list[str], words: str
):
  ask = ['think', f'--model_dir={trained}', '--prompt=w1', f'--template={template}', '--thinkers=2']
  refused = exitax(*ask, '--tokens=5', '--answer_tokens=0', *flags)
  assert refused.status == 2
  assert words in refused.err
  assert refused.err.count('\n') == 1


def test_twins_are_warned_of(exitax: RunCommand, trained: Path, tmp_path: Path):
  path = tmp_path / 'alike.toml'
  path.write_text(SHORT.replace('|{thinker}', '|'))
  ask = ['think', f'--model_dir={trained}', '--prompt=w1', f'--template={path}', '--thinkers=2']
  ask += ['--tokens=5', '--answer_tokens=0', '--positions=shared', '--json']
  warned = exitax(*ask)
  assert 'they will stay identical' in warned.err
  one, two = (json.loads(line) for line in warned.out.splitlines())
  assert one['tokens'] == two['tokens']
  assert exitax(*ask, '--temperature=1').err == ''


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('prompt = 1', 'prompt is missing, unknown or no text'),
    (SHORT + 'more = ""', 'more is missing, unknown or no text'),
    ('prompt = ', 'is not TOML'),
  ],
)
def test_bad_templates_are_named(tmp_path: Path, text: str, words: str):
  path = tmp_path / 'bad.toml'
  path.write_text(text)
  with pytest.raises(UserError, match=words):
    ThinkTemplate.read(path)


def test_the_packaged_template_names_everybody():
  template = ThinkTemplate.read()
  prompt = template.filled('prompt', problem='why {thinker}?', thinkers=3)
  assert 'why {thinker}?' in prompt and prompt.startswith('3 thinkers')
  headers = [template.filled('header', problem='', thinkers=3, thinker=n) for n in range(3)]
  assert [f'Thinker {n}' in header for n, header in enumerate(headers, 1)] == [True] * 3
  assert template.answer.strip()


def test_a_board_shows_columns_and_the_answer():
  board = Board(2, (1, 2))
  for thinker, piece in [(0, 'left'), (1, 'right'), (ANSWER, 'sum')]:
    board.add(
      ThoughtEvent(
        thinker=thinker,
        piece=piece,
        token=1,
        exit_layer=2,
        confidence=0.5,
        stop_reason=StopReason.BUDGET,
      )
    )
  console = Console(width=60, record=True, force_terminal=True, file=io.StringIO())
  console.print(board.columns())
  lines = console.export_text().splitlines()
  assert any('left' in line and 'right' in line for line in lines)
  assert any('sum' in line for line in lines)
  assert 'exits  1: 0%  2: 100%' in board.summary(1.0)
