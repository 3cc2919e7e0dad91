from __future__ import annotations

import csv
import io
import json

import pytest

from exitax import evaluate
from tests.evaluate.conftest import make_report

PNG_HEADER = b'\x89PNG\r\n\x1a\n'


def csv_lines(report):
  return list(csv.DictReader(io.StringIO(evaluate.to_csv(report))))


def test_three_files_are_written_and_read_back(tmp_path):
  report = make_report()
  files = evaluate.write_report(report, tmp_path / 'new' / 'folder')
  assert sorted(path.name for path in files.json.parent.iterdir()) == [
    'evaluation.csv',
    'evaluation.json',
    'evaluation.png',
  ]
  read = json.loads(files.json.read_text())
  assert read['exits'][2] == {
    'name': 'final',
    'layer': 4,
    'nll': 1.0,
    'bits_per_byte': 1.0,
    'accuracy': 0.5,
  }
  assert [row['threshold'] for row in read['thresholds'][:4]] == [1.0, 0.9, 0.5, 0.0]
  assert read['speed']['rows'][1]['speed_up'] == 1.25
  assert read['machine']['processor'] == 'Abacus'
  assert read['oracle']['agreement'] == 1.0
  assert files.csv.read_text() == evaluate.to_csv(report)
  assert files.picture.read_bytes().startswith(PNG_HEADER)


def test_csv_has_a_line_for_every_exit_threshold_and_the_oracle():
  report = make_report()
  lines = csv_lines(report)
  assert [line['kind'] for line in lines] == ['exit'] * 3 + ['threshold'] * 8 + ['oracle']
  final = lines[2]
  assert (final['name'], final['effective_layers'], final['agreement']) == ('final', '4', '1.0')
  assert (final['threshold'], final['share_final'], final['speed_up']) == ('', '', '')
  timed, untimed = lines[4], lines[8]
  assert (timed['name'], timed['threshold'], timed['speed_up']) == ('max_prob', '0.9', '1.25')
  assert float(timed['decoded_effective_layers']) == 3.5
  assert float(timed['decoded_agreement']) == pytest.approx(0.8)
  assert (untimed['name'], untimed['threshold'], untimed['speed_up']) == ('margin', '0.9', '')
  for line, row in zip(lines[3:11], report.thresholds, strict=True):
    assert float(line['nll']) == row.nll
    shares = [float(line[f'share_{name}']) for name in ('exit_1', 'exit_2', 'final')]
    assert shares == list(row.exit_shares)


def test_csv_columns_do_not_depend_on_whether_speed_was_measured():
  timed, untimed = (evaluate.to_csv(make_report(timed=t)) for t in (True, False))
  assert timed.splitlines()[0] == untimed.splitlines()[0]
  assert timed.splitlines()[0].startswith('kind,name,threshold,effective_layers,nll')


def test_a_failed_write_leaves_the_older_files_as_they_were(tmp_path, monkeypatch):
  old = evaluate.write_report(make_report(timed=False), tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full_disk(source, target):
    raise OSError('disk is full')

  monkeypatch.setattr('os.replace', full_disk)
  with pytest.raises(OSError, match='disk is full'):
    evaluate.write_report(make_report(), old.json.parent)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_find_their_times():
  report = make_report()
  assert report.confidences == ('max_prob', 'margin')
  assert [report.speed_of(row).speed_up for row in report.rows_of('max_prob')] == [
    1.0,
    1.25,
    1.5,
    1.75,
  ]
  assert {report.speed_of(row) for row in report.rows_of('margin')} == {None}
