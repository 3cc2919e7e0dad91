"""Opening a model directory."""

from __future__ import annotations

import math
import os
from collections.abc import Collection

import jax

from exitax.checkpoint import load_model
from exitax.decode import CacheFormat, WeightFormat
from exitax.errors import UserError, choose
from exitax.language_model.model import LanguageModel
from exitax.parallel import MeshConfig, ShardingRules, make_mesh


def load(
  model_dir: str | os.PathLike[str],
  *,
  step: int | None = None,
  exits: Collection[int] | None = None,
  mesh: MeshConfig = MeshConfig(data=1),
  rules: ShardingRules = ShardingRules(),
  weights: str | WeightFormat = WeightFormat.COMPUTE,
  kv_cache: str | CacheFormat = CacheFormat.COMPUTE,
) -> LanguageModel:
  """Opens a model directory that `exitax train` wrote.

  Args:
    model_dir: the directory.
    step: which checkpoint; the latest by default.
    exits: layers whose exits are used, `()` for none; all by default.
    mesh: devices to use; the first one by default. `pipeline` stages are for `strategy='pipeline'`.
    rules: how parameters lie on them.
    weights: 'compute', or 'int8' to generate with matrices of 8 bits (a quarter of the memory of float32, and an
      approximation; scores are those of the full ones).
    kv_cache: 'compute', or 'int8' to keep keys and values in 8 bits, another approximation.

  Raises:
    UserError: the directory holds no model, or a damaged one.
  """
  device_mesh = _mesh_of(mesh)
  loaded = load_model(model_dir, mesh=device_mesh, rules=rules, step=step, exits=exits)
  weights = choose(WeightFormat, weights, name='weights')
  kv_cache = choose(CacheFormat, kv_cache, name='kv_cache')
  return LanguageModel(loaded, mesh=device_mesh, rules=rules, weights=weights, kv_cache=kv_cache)


def _mesh_of(config: MeshConfig) -> jax.sharding.Mesh:
  """A mesh of the first devices, as many as it has places; of all if an axis takes what is left."""
  sizes, devices = config.sizes.values(), jax.devices()
  if any(size < 1 for size in sizes):  # -1, or a size that `make_mesh` refuses.
    return make_mesh(config)
  size = math.prod(sizes)
  if size > len(devices):
    raise UserError(
      f'mesh {config} needs {size} devices and there {"is" if len(devices) == 1 else "are"} '
      f'{len(devices)}: make it smaller, or try it on a CPU with --emulate_devices={size}'
    )
  return make_mesh(config, devices[:size])
