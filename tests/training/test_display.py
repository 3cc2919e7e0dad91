from __future__ import annotations

import io

from rich.console import Console

from exitax import training

METRICS = {
  'train/exit_1/nll': 4.25,
  'train/final/nll': 3.5,
  'tokens_per_second': 12345.6,
  'step_seconds': 2.0,
}


def _shown(*, terminal: bool, metrics=METRICS) -> str:
  output = io.StringIO()
  console = Console(file=output, force_terminal=terminal, width=120, highlight=False)
  with training.ConsoleDisplay(console) as display:
    display.begin(step=10, train_steps=100, depth_names=('exit_1', 'final'))
    display.message('resuming from [step 10]')
    display.advance(20)
    display.update(20, metrics)
  return output.getvalue()


def test_piped_output_is_one_line_per_report():
  message, line = _shown(terminal=False).splitlines()
  assert message == 'resuming from [step 10]'
  wanted = 'step 20/100 loss exit_1 4.250 final 3.500 12,346 tok/s left 2:40'
  assert ' '.join(line.split()) == wanted


def test_speed_is_left_out_before_it_is_known():
  losses = {name: value for name, value in METRICS.items() if name.startswith('train')}
  line = _shown(terminal=False, metrics=losses).splitlines()[-1]
  assert 'final  3.500' in line
  assert 'tok/s' not in line
  assert 'left' not in line


def test_a_terminal_shows_a_bar_with_losses_speed_and_place():
  shown = _shown(terminal=True)
  for words in ('resuming from [step 10]', '20/100', 'exit_1', '4.250', '12,346 tok/s'):
    assert words in shown
