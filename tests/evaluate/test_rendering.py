from __future__ import annotations

import dataclasses

from exitax import evaluate
from tests.evaluate.conftest import make_report


def table_after(text: str, title: str) -> list[list[str]]:
  """Cells of the table below the line that starts with `title`, header first, without its rule."""
  lines = text.splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
  end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
  return [line.split() for line in lines[start:end] if not line.startswith('-')]


def test_the_text_says_what_was_measured_where():
  text = evaluate.render_report(make_report())
  assert 'runs/tiny at step 7: 4 layers, exits after layers: 1, 2; 12,345 parameters' in text
  assert '400 of 1,000 held-out tokens of words (2.00 bytes per token)' in text
  assert 'Full decoding: 99.5 tokens/s on Abacus, 2 cores, cpu' in text
  assert '\x1b' not in text
  assert text.endswith('\n')


def test_tables_hold_the_numbers():
  report = make_report()
  text = evaluate.render_report(report)
  exits = table_after(text, 'Each exit alone')
  assert exits[1:] == [
    ['exit_1', '1', '3.0000', '2.0000', '0.00%', '50.00%'],
    ['exit_2', '2', '2.0000', '1.5000', '25.00%', '75.00%'],
    ['final', '4', '1.0000', '1.0000', '50.00%', '100.00%'],
  ]
  header, *rows = table_after(text, 'Exit where max_prob > threshold')
  assert header[-4:] == ['tokens/s', 'speed-up', 'same', 'text']
  assert [row[0] for row in rows] == ['1.00', '0.90', '0.50', '0.00']
  assert rows[0][1:3] == ['4.00', f'{report.thresholds[0].nll:.4f}']
  assert rows[1][-3:] == ['101.0', '1.25x', '80.0%']


def test_columns_are_aligned():
  text = evaluate.render_report(make_report())
  start = text.index('Each exit alone')
  lines = text[start:].splitlines()[1:6]
  assert len({len(line) for line in lines}) == 1


def test_without_times_there_are_no_columns_for_them():
  untimed = evaluate.render_report(make_report(timed=False))
  assert 'Speed of decoding was not measured' in untimed
  assert 'tokens/s' not in untimed
  report = make_report()
  bare = dataclasses.replace(report, speed=dataclasses.replace(report.speed, rows=()))
  assert 'speed-up' not in evaluate.render_report(bare)
