r"""Turns Hugging Face checkpoints into model directories, and model directories into checkpoints.

  exitax convert from-hf models/Llama-3.2-1B runs/llama
  exitax convert to-hf runs/llama models/llama-with-exits

from-hf reads Llama, Mistral, Qwen2 and Qwen3 (and what is published under these architectures) from
safetensors; weights go block by block from the files into the checkpoint, so that a model may be
larger than the memory. The tokenizer, its chat template and the ids that end an answer come along,
and exits if exitax_exits.safetensors is there.

to-hf writes a folder that transformers loads; exits go into exitax_exits.safetensors, which it does
not see.

  exitax convert to-peft runs/adapted adapters/mine
  exitax convert from-peft adapters/mine runs/again --base=runs/llama
  exitax convert merge runs/adapted runs/merged

LoRA adapters go out and in in PEFT's format; merge adds them to the weights, as to-hf does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from exitax.checkpoint import LoadedModel, load_model
from exitax.commands import flags as flag_groups
from exitax.commands.console import CommandConsole
from exitax.convert import (
  SHARD_BYTES,
  from_huggingface,
  from_peft,
  open_source,
  to_huggingface,
  to_peft,
  write_variant,
)
from exitax.errors import UserError
from exitax.layers import Precision, merge_lora
from exitax.models import ExitLM, ModelConfig
from exitax.parallel import MeshConfig, ShardingRules, format_bytes, make_mesh

_DTYPES = ('float32', 'bfloat16')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  ways = parser.add_subparsers(
    dest='way', required=True, metavar='from-hf|to-hf|to-peft|from-peft|merge'
  )
  inward = ways.add_parser('from-hf', help='a Hugging Face folder to a model directory')
  inward.add_argument('path', metavar='PATH', help='the folder: config.json, *.safetensors')
  inward.add_argument('out', metavar='OUT', help='the model directory, new or empty')
  inward.add_argument('--tokenizer', metavar='PATH', help="instead of the folder's own")
  inward.add_argument('--max_length', type=int, metavar='N', help='a shorter context')
  inward.add_argument(
    '--precision',
    choices=_DTYPES,
    help='of the computation (bfloat16 for weights of bfloat16, else float32)',
  )
  outward = ways.add_parser('to-hf', help='a model directory to a Hugging Face folder')
  outward.add_argument('checkpoint', metavar='CHECKPOINT', help='the model directory')
  outward.add_argument('out', metavar='OUT', help='the folder, new or empty')
  outward.add_argument('--step', type=int, help='which checkpoint (the latest by default)')
  outward.add_argument(
    '--max_shard_bytes', type=int, default=SHARD_BYTES, metavar='N', help='most bytes of one file'
  )
  adapters = ways.add_parser('to-peft', help="a model's LoRA adapters to a PEFT folder")
  adapters.add_argument('checkpoint', metavar='CHECKPOINT', help='the model directory')
  adapters.add_argument('out', metavar='OUT', help='the folder, new or empty')
  adapters.add_argument('--step', type=int, help='which checkpoint (the latest by default)')
  adapters.add_argument('--base', metavar='NAME', help='what PEFT is to call the base model')
  adapted = ways.add_parser('from-peft', help='a PEFT folder to a model directory with adapters')
  adapted.add_argument('path', metavar='ADAPTER', help='the folder')
  adapted.add_argument('out', metavar='OUT', help='the model directory, new or empty')
  adapted.add_argument('--base', metavar='DIR', required=True, help='the model directory adapted')
  merged = ways.add_parser('merge', help='a model directory without adapters of one with them')
  merged.add_argument('checkpoint', metavar='CHECKPOINT', help='the model directory')
  merged.add_argument('out', metavar='OUT', help='the model directory, new or empty')
  merged.add_argument('--step', type=int, help='which checkpoint (the latest by default)')
  for way in (adapters, adapted, merged):
    flag_groups.add_device_flags(way)
  for way in (inward, outward):
    way.add_argument('--dtype', choices=_DTYPES, help="of the weights kept (each one's own)")
    flag_groups.add_device_flags(way)
  outward.add_argument(
    '--tensor', type=int, default=1, metavar='N', help='spread the weights over N devices'
  )


def run(flags: argparse.Namespace) -> int:
  """Converts."""
  flag_groups.start_jax(flags)
  if flags.way == 'from-hf':
    print(_from_huggingface(flags))
  elif flags.way == 'to-hf':
    print(_to_huggingface(flags))
  else:
    print(_adapters(flags))
  return 0


def _from_huggingface(flags: argparse.Namespace) -> str:
  precision = None if flags.precision is None else Precision(flags.precision)
  source = open_source(
    flags.path, tokenizer=flags.tokenizer, max_length=flags.max_length, precision=precision
  )
  with _bar(f'reading {flags.path}', source.num_bytes) as report:
    from_huggingface(source, flags.out, dtype=_dtype(flags), report=report)
  return f'{flags.out}: {_described(source.config)}, {format_bytes(source.num_bytes)} read'


def _to_huggingface(flags: argparse.Namespace) -> str:
  loaded = _load(flags.checkpoint, step=flags.step, tensor=flags.tensor)
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
  settings = {'dtype': _dtype(flags), 'shard_bytes': flags.max_shard_bytes}
  with _bar(f'writing {flags.out}', total) as report:
    to_huggingface(loaded, flags.out, **settings, report=report)
  return f'{flags.out}: {_described(loaded.model.config)}'


def _adapters(flags: argparse.Namespace) -> str:
  if flags.way == 'from-peft':
    adapted = from_peft(_load(flags.base), flags.path)
    write_variant(adapted, flags.out)
    return f'{flags.out}: {_described(adapted.model.config)}'
  loaded = _load(flags.checkpoint, step=flags.step)
  config = loaded.model.config
  if flags.way == 'to-peft':
    to_peft(loaded, flags.out, base=flags.base)
    return f'{flags.out}: {_described(config)}'
  if config.lora is None:
    raise UserError(f'{flags.checkpoint} has no adapters: there is nothing to merge')
  plain = dataclasses.replace(config, lora=None)
  merged = dataclasses.replace(
    loaded, model=ExitLM(plain), params=merge_lora(loaded.params, config.lora)
  )
  write_variant(merged, flags.out)
  return f'{flags.out}: {_described(plain)}'


def _load(path: str, *, step: int | None = None, tensor: int = 1) -> LoadedModel:
  return load_model(path, mesh=_mesh(tensor), rules=ShardingRules(), step=step)


def _mesh(tensor: int) -> jax.sharding.Mesh:
  if not 1 <= tensor <= jax.device_count():
    raise UserError(
      f'--tensor={tensor} is not between 1 and the {jax.device_count()} devices that are here'
    )
  return make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])


def _dtype(flags: argparse.Namespace) -> jnp.dtype | None:
  return None if flags.dtype is None else jnp.dtype(flags.dtype)


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
  """A bar of bytes on standard error, where that is a terminal."""
  console = CommandConsole(stderr=True)
  columns = (TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TimeRemainingColumn())
  with Progress(
    *columns, console=console, transient=True, disable=not console.is_terminal
  ) as progress:
    task = progress.add_task(label, total=total)
    yield lambda num_bytes: progress.advance(task, num_bytes)


def _described(config: ModelConfig) -> str:
  exits = ', '.join(str(item.layer) for item in config.exits)
  layers = f'{config.num_layers} layers of width {config.embed_dim}, {config.vocab_size} ids'
  if config.lora is not None:
    layers += f', adapters of rank {config.lora.rank}'
  return f'{layers}, {f"exits after {exits}" if exits else "no exits"}, {config.precision.value}'
