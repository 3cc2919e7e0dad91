r"""Writes text after a prompt, each token in the colour of the layer it left at.

  exitax generate --model_dir=runs/quickstart --prompt='def main(' --threshold=0.8
  exitax generate --model_dir=runs/quickstart --prompt='import ' --prompt='class ' \
    --temperature=0.8 --json

  exitax generate --model_dir=runs/quickstart --prompt='def ' --gin_file=gin/decode/deferred.gin

  exitax generate --model_dir=runs/quickstart --prompt='def ' --strategy=pipeline --threshold=0.3 \
    --gin.MeshConfig.pipeline=3 --emulate_devices=3

--threshold=certified takes the threshold that `exitax calibrate` has certified for the model.

Every setting is a field of GenerateConfig in gin, and a flag that wins over it. Without --strategy a
threshold means deferred exits, and no threshold speculation, which gives the text of full depth.
A confidence must be above the threshold, so 1 never exits. Piped output is plain and lists the
layers of its tokens; --depths gives every token a line, with its confidence.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.console import CommandConsole
from exitax.commands.depths import coloured, depth_key, depth_summary
from exitax.decode import Sampler, StrategySettings
from exitax.errors import UserError
from exitax.language_model import (
  LanguageModel,
  TextCompletion,
  Threshold,
  load,
)
from exitax.parallel import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
  """How text is generated: bound in gin, each field also a flag.

  Attributes:
    max_new_tokens: tokens per prompt at most.
    strategy: 'full', 'deferred', 'recompute', 'pipeline', 'copy_state', 'speculative', or None (see
      above).
    threshold: exits where the confidence is above it; one number, one per exit, or 'certified'.
    confidence: 'max_prob' (the default, or else the certificate's), 'margin', 'entropy', 'patience', 'cosine' or 'classifier'.
    patience: exits that must agree, for 'patience'.
    decay: how fast thresholds fall with the tokens generated (CALM uses 4); 0 keeps them.
    exit_layer: speculation drafts after this layer always (with num_drafts); None chooses.
    num_drafts: drafts of every round of speculation; None chooses.
    acceptance: 'coupled' (a seed gives the text of full depth) or 'rejection' (accepts more).
    weights: 'compute', or 'int8': matrices in 8 bits, an approximation.
    kv_cache: 'compute', or 'int8': keys and values in 8 bits, an approximation.
    temperature: 0 is greedy. None, as for the next three: the model's generation.json, or else greedy.
    top_k: keeps the k best tokens; 0 keeps all.
    top_p: keeps the fewest tokens whose probabilities reach it; 1 keeps all.
    min_p: keeps tokens of at least this fraction of the best one's probability.
    seed: prompt i uses seed + i.
  """

  max_new_tokens: int = 64
  strategy: str | None = None
  threshold: Threshold = None
  confidence: str | None = None
  patience: int = 2
  decay: float = 0.0
  exit_layer: int | None = None
  num_drafts: int | None = None
  acceptance: str = 'coupled'
  weights: str = 'compute'
  kv_cache: str = 'compute'
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  seed: int = 0

  def settings(self, model: LanguageModel) -> dict[str, Any]:
    """Arguments of `LanguageModel.generate` for a model.

    Raises:
      UserError: a strategy that the model cannot do, or what its certificate does not speak of.
    """
    sampler = self._sampler(model.default_sampler)
    choice = model.exit_choice(
      strategy=self.strategy,
      threshold=self.threshold,
      confidence=self.confidence,
      max_new_tokens=self.max_new_tokens,
      temperature=sampler.temperature,
      patience=self.patience,
      decay=self.decay,
    )
    settings = StrategySettings(
      strategy=choice.strategy,
      threshold=choice.threshold,
      confidence=choice.confidence,
      patience=self.patience,
      decay=self.decay,
      exit_layer=self.exit_layer,
      num_drafts=self.num_drafts,
      acceptance=self.acceptance,
    )
    return {
      'max_new_tokens': self.max_new_tokens,
      'policy': settings.policy(model.config),
      'sampler': sampler,
      'seed': self.seed,
    }

  def _sampler(self, default: Sampler) -> Sampler:
    given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampler)}
    return dataclasses.replace(
      default, **{name: value for name, value in given.items() if value is not None}
    )


gin_config.make_configurable(GenerateConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_checkpoint_flags(parser)
  text = parser.add_argument_group('text')
  text.add_argument('--prompt', action='append', default=[], help='repeatable; a batch')
  text.add_argument('--prompt_file', metavar='FILE', help='a prompt from a file, - for stdin')
  text.add_argument('--max_new_tokens', type=int, metavar='N', help='64 by default')
  exits = parser.add_argument_group('early exit')
  exits.add_argument(
    '--threshold',
    type=flag_groups.thresholds,
    metavar='T',
    help='exit where the confidence is above it; one number, one per exit as 0.9,0.8, or certified: what '
    '`exitax calibrate` has certified for this model',
  )
  exits.add_argument(
    '--strategy',
    metavar='NAME',
    help='full, deferred, recompute, pipeline (needs --gin.MeshConfig.pipeline=N), copy_state or '
    'speculative (the default for models with exits)',
  )
  exits.add_argument(
    '--confidence',
    metavar='NAME',
    help='max_prob (the default), margin, entropy, patience, cosine or classifier',
  )
  exits.add_argument(
    '--patience', type=int, metavar='N', help='exits that must agree, 2 by default'
  )
  exits.add_argument(
    '--decay', type=float, metavar='RATE', help='thresholds fall with the tokens; CALM uses 4'
  )
  exits.add_argument('--exit_layer', type=int, metavar='L', help='speculation: draft after it')
  exits.add_argument('--num_drafts', type=int, metavar='N', help='speculation: drafts a round')
  exits.add_argument(
    '--acceptance', metavar='RULE', help='speculation: coupled (the default) or rejection'
  )
  exits.add_argument('--depths', action='store_true', help='list tokens with layer and confidence')
  parser.add_argument('--weights', metavar='FORMAT', help='compute (the default) or int8')
  parser.add_argument('--kv_cache', metavar='FORMAT', help='compute (the default) or int8')
  flag_groups.add_sampling_flags(parser)
  parser.add_argument('--json', action='store_true', help='one JSON object per prompt')
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Generates."""
  flag_groups.start_jax(flags)
  if not flags.model_dir:
    raise UserError('generate needs a model: --model_dir=DIR, such as runs/quickstart')
  # One device unless told otherwise: a single prompt does not spread over the data axis.
  flag_groups.parse_gin(flags, text='MeshConfig.data = 1', bind_model_dir=False)
  config = flag_groups.override(gin_config.build(GenerateConfig), flags)
  prompts = read_prompts(flags)
  mesh = gin_config.build(MeshConfig)
  model = load(
    flags.model_dir,
    step=flags.step,
    exits=flags.exits,
    mesh=mesh,
    weights=config.weights,
    kv_cache=config.kv_cache,
  )
  settings = config.settings(model)
  console = CommandConsole()
  if len(prompts) == 1 and console.is_terminal and not (flags.json or flags.depths):
    _stream(model, prompts[0], settings, console)
    return 0
  for completion in model.generate(prompts, **settings):
    if flags.json:
      print(json.dumps(_as_json(completion)), flush=True)
    else:
      show(completion, model.config.depths, console, with_depths=flags.depths)
  return 0


def show(
  completion: TextCompletion,
  depths: tuple[int, ...],
  console: Console,
  *,
  with_depths: bool = False,
) -> None:
  """Prints a completion after its prompt, and how deep its tokens went."""
  console.print(completion.prompt, style='bold', end='', markup=False)
  console.print(coloured(completion.pieces, completion.exit_layers, depths))
  if with_depths:
    rows = zip(completion.pieces, completion.exit_layers, completion.confidences, strict=False)
    for piece, layer, confidence in rows:
      console.print(f'{layer:>4}  {confidence:.3f}  {piece!r}', markup=False)
  in_colour = console.color_system is not None and not console.no_color
  console.print(depth_key(completion.exit_layers, depths, in_colour=in_colour))
  console.print(depth_summary(completion.exit_layers, depths), style='dim', markup=False)


def _stream(model: LanguageModel, prompt: str, settings: dict[str, Any], console: Console) -> None:
  """Prints tokens as they are chosen."""
  depths, layers = model.config.depths, []
  console.print(prompt, style='bold', end='', markup=False)
  start = time.perf_counter()
  for event in model.stream(prompt, **settings):
    layers.append(event.exit_layer)
    console.print(coloured([event.piece], [event.exit_layer], depths), end='')
  seconds = time.perf_counter() - start
  console.print()
  console.print(depth_key(layers, depths, in_colour=not console.no_color))
  console.print(
    f'{depth_summary(layers, depths)}  {len(layers) / seconds:.0f} tok/s, compilation included',
    style='dim',
    markup=False,
  )


def read_prompts(flags: argparse.Namespace, *, command: str = 'generate') -> list[str]:
  """What `--prompt` and `--prompt_file` give, at least one."""
  prompts = list(flags.prompt)
  if flags.prompt_file:
    try:
      prompts.append(_read_prompt(flags.prompt_file))
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'--prompt_file={flags.prompt_file} cannot be read: {error}') from None
  if not prompts:
    raise UserError(f"{command} needs a prompt: --prompt='def main('")
  return prompts


def _read_prompt(path: str) -> str:
  if path != '-':
    return Path(path).read_text(encoding='utf-8')
  if sys.stdin is None:  # As after `<&-`.
    raise OSError('standard input is closed')
  # UTF-8 whatever the locale says, and no byte smuggled through as half of a pair.
  return io.TextIOWrapper(sys.stdin.buffer, encoding='utf-8').read()


def _as_json(completion: TextCompletion) -> dict[str, Any]:
  fields = dataclasses.asdict(completion)
  fields['stop_reason'] = completion.stop_reason.name.lower()
  return {**fields, 'effective_layers': completion.effective_layers}
