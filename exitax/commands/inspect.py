"""Prints a model's parameters: shapes, logical axes, mesh axes and bytes per device.

exitax inspect --gin_file=gin/runs/quickstart.gin
exitax inspect --model_dir=runs/quickstart
exitax inspect --gin_file=gin/runs/quickstart.gin --emulate_devices=8 --gin.MeshConfig.tensor=2
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from exitax.checkpoint import read_model
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.errors import UserError
from exitax.models import ExitLM, ModelConfig
from exitax.parallel import (
  MeshConfig,
  ShardingRules,
  format_bytes,
  make_mesh,
  parameter_report,
  render_report,
)
from exitax.training import RunConfig, abstract_state, learning_rate_schedule, make_optimizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_model_dir(parser, purpose='inspect the model of this directory')
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Prints the table."""
  flag_groups.start_jax(flags)
  if flags.model_dir:
    flag_groups.parse_gin(flags, bind_model_dir=False)
    config, tokenizer = read_model(flags.model_dir)
    print(model_table(config, gin_config.build(MeshConfig), gin_config.build(ShardingRules)))
    print(f'tokenizer of {tokenizer.vocab_size} ids, digest {tokenizer.digest[:12]}')
    return 0
  if not flags.gin_file:
    raise UserError('inspect needs a model: --model_dir=DIR or --gin_file=gin/runs/quickstart.gin')
  unread: dict[str, object] = dict.fromkeys(
    ('MODEL_DIR', 'TRAIN_STEPS', 'MIXTURE_OR_TASK_NAME'), 'unused'
  )
  flag_groups.parse_gin(flags, bind_model_dir=False, if_required=unread)
  model, mesh = gin_config.build(ModelConfig), gin_config.build(MeshConfig)
  print(model_table(model, mesh, gin_config.build(ShardingRules)))
  return 0


def model_table(config: ModelConfig, mesh_config: MeshConfig, rules: ShardingRules) -> str:
  """The table of parameters on a mesh of the devices that are here."""
  model = ExitLM(config)
  shapes = model.abstract_params()
  mesh = make_mesh(mesh_config)
  table = render_report(parameter_report(shapes, model.logical_axes(), mesh, rules))
  exits = ', '.join(
    f'after layer {item.layer} ({item.head.value} head, {item.matrix.value} matrix)'
    for item in config.exits
  )
  return f'{table}\n{config.num_layers} layers; exits: {exits or "none"}'


def describe(run_config: RunConfig) -> str:
  """The table, and what the training state takes on each device."""
  table = model_table(run_config.model, run_config.mesh, run_config.sharding)
  schedule = learning_rate_schedule(run_config.optimizer, train_steps=run_config.loop.train_steps)
  state = abstract_state(
    ExitLM(run_config.model),
    make_optimizer(run_config.optimizer, schedule),
    make_mesh(run_config.mesh),
    run_config.sharding,
    run_config.trained,
  )
  per_device = sum(
    _bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(state)
  )
  tokens = run_config.data.batch_size * run_config.data.length
  return (
    f'{table}\n'
    f'training state: {format_bytes(per_device)} per device (parameters and optimizer)\n'
    f'batch: {run_config.data.batch_size} x {run_config.data.length} = {tokens:,} tokens, '
    f'{run_config.loop.train_steps:,} steps, {tokens * run_config.loop.train_steps:,} tokens in all'
  )


def _bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
  count = 1
  for size in shape:
    count *= size
  return count * dtype.itemsize
