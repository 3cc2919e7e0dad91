r"""Lets several thinkers work on one problem at once; each sees what the others write while they write it.

  exitax think --model_dir=runs/quickstart --prompt='def main(' --thinkers=4 --tokens=32 --temperature=0.8
  exitax think --model_dir=runs/quickstart --prompt='import ' --thinkers=2 --tokens=16 --visibility=none --json

One model, one cache, one read of the weights per step for all of them (Group Think, arXiv 2505.11107). When they have ended,
an answer is written by a text that has seen them all; nothing is read again. Any causal checkpoint will do. What
thinkers are told is a TOML file that can be replaced: --template.

--visibility=full (each sees all tokens of the same step), strict (of earlier steps), lag:D (at least D steps old),
interleaved (the ordinary causal mask over tokens in turns) or none (independent texts on a shared prompt).

Every setting is a field of ThinkSettings in gin, and a flag that wins over it. A terminal shows columns side by side; piped
output has one text after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterable

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.console import CommandConsole
from exitax.commands.depths import depth_style, depth_summary
from exitax.commands.generate import read_prompts
from exitax.decode import Sampler, StopReason
from exitax.errors import UserError
from exitax.language_model import ANSWER, ThinkSettings, ThoughtEvent, load
from exitax.parallel import MeshConfig

gin_config.make_configurable(ThinkSettings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_checkpoint_flags(parser)
  text = parser.add_argument_group('problem')
  text.add_argument('--prompt', action='append', default=[], help='the problem')
  text.add_argument('--prompt_file', metavar='FILE', help='the problem from a file, - for stdin')
  text.add_argument('--template', metavar='FILE', help='TOML with prompt, header and answer')
  group = parser.add_argument_group('group')
  group.add_argument('--thinkers', type=int, metavar='N', help='4 by default')
  group.add_argument(
    '--tokens', dest='max_new_tokens', type=int, metavar='N', help='of each thinker; 64 by default'
  )
  group.add_argument(
    '--answer_tokens', type=int, metavar='N', help='of the answer; 64 by default, 0 for none'
  )
  group.add_argument(
    '--visibility', metavar='NAME', help='full (the default), strict, lag:D, interleaved or none'
  )
  group.add_argument(
    '--positions',
    metavar='NAME',
    help='slots (the default: a block of positions each) or shared (the same positions for all)',
  )
  group.add_argument(
    '--slot_width', type=int, metavar='N', help='positions of a slot (header and tokens)'
  )
  exits = parser.add_argument_group('early exit')
  exits.add_argument(
    '--threshold',
    type=flag_groups.thresholds,
    metavar='T',
    help='exit where the confidence is above it; full depth without',
  )
  exits.add_argument('--confidence', metavar='NAME', help='max_prob by default')
  flag_groups.add_sampling_flags(parser)
  parser.add_argument('--json', action='store_true', help='one JSON object per text')
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Thinks."""
  flag_groups.start_jax(flags)
  if not flags.model_dir:
    raise UserError('think needs a model: --model_dir=DIR, such as runs/quickstart')
  flag_groups.parse_gin(flags, text='MeshConfig.data = 1', bind_model_dir=False)
  settings = flag_groups.override(gin_config.build(ThinkSettings), flags)
  problems = read_prompts(flags, command='think')
  if len(problems) > 1:
    raise UserError(f'{len(problems)} problems: a group thinks about one')
  mesh = gin_config.build(MeshConfig)
  model = load(flags.model_dir, step=flags.step, exits=flags.exits, mesh=mesh)
  events = model.think(
    problems[0],
    settings,
    threshold=flags.threshold,
    confidence=flags.confidence,
    sampler=_sampler(model.default_sampler, flags),
  )
  console = CommandConsole()
  board = Board(settings.thinkers, model.config.depths)
  show_live = console.is_terminal and not flags.json
  start = time.perf_counter()
  with (
    Live(console=console, refresh_per_second=12) if show_live else contextlib.nullcontext() as live
  ):
    for event in events:
      board.add(event)
      if live is not None:
        live.update(board.columns())
  if flags.json:
    for line in board.as_json():
      print(json.dumps(line), flush=True)
    return 0
  if not show_live:
    for line in board.plain():
      console.print(line, markup=False)
  console.print(board.summary(time.perf_counter() - start), style='dim', markup=False)
  return 0


class Board:
  """What has been written so far, a text per thinker and the answer."""

  def __init__(self, thinkers: int, depths: tuple[int, ...]) -> None:
    self._depths = depths
    self._events: dict[int, list[ThoughtEvent]] = {number: [] for number in range(thinkers)}

  def add(self, event: ThoughtEvent) -> None:
    """Takes in a token."""
    self._events.setdefault(event.thinker, []).append(event)

  def columns(self) -> RenderableType:
    """Thinkers side by side, each token in the colour of its exit, and the answer below."""
    thinkers = [
      Panel(self._text(number), title=f'Thinker {number + 1}', title_align='left')
      for number in self._events
      if number != ANSWER
    ]
    parts: list[RenderableType] = [Columns(thinkers, equal=True, expand=True)]
    if ANSWER in self._events:
      parts.append(Panel(self._text(ANSWER), title='Answer', title_align='left'))
    return Group(*parts)

  def plain(self) -> Iterable[str]:
    """One text after the other."""
    for number in self._events:
      yield f'{_name(number)}: {self._plain(number)}'

  def as_json(self) -> Iterable[dict[str, object]]:
    """A JSON object per text."""
    for number, events in self._events.items():
      ended = events[-1].stop_reason if events else StopReason.RUNNING
      yield {
        'thinker': None if number == ANSWER else number + 1,
        'text': self._plain(number),
        'tokens': [event.token for event in events],
        'exit_layers': [event.exit_layer for event in events],
        'confidences': [event.confidence for event in events],
        'stop_reason': ended.name.lower(),
      }

  def summary(self, seconds: float) -> str:
    """Tokens, depths and time."""
    layers = [event.exit_layer for events in self._events.values() for event in events]
    return f'{depth_summary(layers, self._depths)}  {len(layers)} tokens in {seconds:.1f} s, compilation included'

  def _text(self, number: int) -> Text:
    text = Text()
    for event in self._events[number]:
      text.append(event.piece, style=depth_style(event.exit_layer, self._depths))
    return text

  def _plain(self, number: int) -> str:
    return ''.join(event.piece for event in self._events[number])


def _name(number: int) -> str:
  return 'Answer' if number == ANSWER else f'Thinker {number + 1}'


def _sampler(default: Sampler, flags: argparse.Namespace) -> Sampler:
  return flag_groups.override(default, flags)
