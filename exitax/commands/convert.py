r"""Turns Hugging Face checkpoints into model directories, and model directories into checkpoints.

  exitax convert from-hf models/Llama-3.2-1B runs/llama
  exitax convert to-hf runs/llama models/llama-with-exits

from-hf reads Llama, Mistral, Qwen2 and Qwen3 (and what is published under these architectures) from
safetensors; weights go tensor by tensor from the files into the checkpoint. The tokenizer, its chat
template and the ids that end an answer come along, and exits if exitax_exits.safetensors is there.

to-hf writes a folder that transformers loads; exits go into exitax_exits.safetensors, which it does
not see.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from exitax.checkpoint import load_model
from exitax.commands import flags as flag_groups
from exitax.convert import SHARD_BYTES, from_huggingface, open_source, to_huggingface
from exitax.errors import UserError
from exitax.layers import Precision
from exitax.models import ModelConfig
from exitax.parallel import MeshConfig, ShardingRules, format_bytes, make_mesh

_DTYPES = ('float32', 'bfloat16')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  ways = parser.add_subparsers(dest='way', required=True, metavar='from-hf|to-hf')
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
  for way in (inward, outward):
    way.add_argument('--dtype', choices=_DTYPES, help="of the weights kept (each one's own)")
    flag_groups.add_device_flags(way)
    way.add_argument(
      '--tensor', type=int, default=1, metavar='N', help='spread the weights over N devices'
    )


def run(flags: argparse.Namespace) -> int:
  """Converts."""
  flag_groups.start_jax(flags)
  dtype = None if flags.dtype is None else jnp.dtype(flags.dtype)
  if flags.tensor < 1 or flags.tensor > jax.device_count():
    raise UserError(
      f'--tensor={flags.tensor} is not between 1 and the {jax.device_count()} devices that are here'
    )
  mesh = make_mesh(MeshConfig(data=1, tensor=flags.tensor), jax.devices()[: flags.tensor])
  rules = ShardingRules()
  if flags.way == 'from-hf':
    precision = None if flags.precision is None else Precision(flags.precision)
    source = open_source(
      flags.path, tokenizer=flags.tokenizer, max_length=flags.max_length, precision=precision
    )
    with _bar(f'reading {flags.path}', source.num_bytes) as report:
      from_huggingface(source, flags.out, mesh=mesh, rules=rules, dtype=dtype, report=report)
    print(f'{flags.out}: {_described(source.config)}, {format_bytes(source.num_bytes)} read')
    return 0
  loaded = load_model(flags.checkpoint, mesh=mesh, rules=rules, step=flags.step)
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
  with _bar(f'writing {flags.out}', total) as report:
    to_huggingface(loaded, flags.out, dtype=dtype, shard_bytes=flags.max_shard_bytes, report=report)
  print(f'{flags.out}: {_described(loaded.model.config)}')
  return 0


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
  """A bar of bytes on standard error, where that is a terminal."""
  console = Console(stderr=True)
  columns = (TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TimeRemainingColumn())
  with Progress(
    *columns, console=console, transient=True, disable=not console.is_terminal
  ) as progress:
    task = progress.add_task(label, total=total)
    yield lambda num_bytes: progress.advance(task, num_bytes)


def _described(config: ModelConfig) -> str:
  exits = ', '.join(str(item.layer) for item in config.exits)
  layers = f'{config.num_layers} layers of width {config.embed_dim}, {config.vocab_size} ids'
  return f'{layers}, {f"exits after {exits}" if exits else "no exits"}, {config.precision.value}'
