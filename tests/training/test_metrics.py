from __future__ import annotations

import json

from exitax import training
from exitax.training.metrics import METRICS_FILE, TENSORBOARD_FOLDER, FileMetricsWriter


def _write(directory, *steps, resumed_step=0, **values):
  with FileMetricsWriter(directory, resumed_step=resumed_step) as writer:
    for step in steps:
      writer.write(step, {'loss': step / 2, **values})


def test_lines_are_read_back(tmp_path):
  _write(tmp_path / 'new' / 'folder', 1, 2)
  assert training.read_metrics(tmp_path / 'new' / 'folder') == [
    {'step': 1, 'loss': 0.5},
    {'step': 2, 'loss': 1.0},
  ]
  events = list((tmp_path / 'new' / 'folder' / TENSORBOARD_FOLDER).iterdir())
  assert len(events) == 1
  assert b'loss' in events[0].read_bytes()


def test_resuming_drops_what_will_be_repeated(tmp_path):
  _write(tmp_path, 2, 4, 4, 6, 8)
  _write(tmp_path, 6, 8, resumed_step=4, again=1.0)
  lines = training.read_metrics(tmp_path)
  assert [line['step'] for line in lines] == [2, 4, 4, 6, 8]
  assert ['again' in line for line in lines] == [False, False, False, True, True]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
  _write(tmp_path, 1, 2)
  with open(tmp_path / METRICS_FILE, 'a') as file:
    file.write('{"step": 3, "lo')
  assert [line['step'] for line in training.read_metrics(tmp_path)] == [1, 2]
  _write(tmp_path, 3, resumed_step=2)
  text = (tmp_path / METRICS_FILE).read_text()
  assert [json.loads(line)['step'] for line in text.splitlines()] == [1, 2, 3]


def test_lines_are_on_their_way_before_the_end(tmp_path):
  with FileMetricsWriter(tmp_path, resumed_step=0) as writer:
    writer.write(5, {'loss': 1.0})
    assert training.read_metrics(tmp_path) == [{'step': 5, 'loss': 1.0}]


def test_no_file_is_no_lines(tmp_path):
  assert training.read_metrics(tmp_path) == []
