"""Which model, on which text, on which machine: what numbers mean nothing without."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from pathlib import Path

import jax
from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel
from exitax.data import Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
  """A trained model.

  Attributes:
    directory: where it was loaded from.
    step: optimizer steps behind it.
    parameters: how many numbers it has.
    num_layers: its depth.
    embed_dim: width of its residual stream.
    vocab_size: rows of its vocabulary matrix.
    precision: format of its computation.
    depths: layers before each exit, the final layer last.
  """

  directory: str
  step: int
  parameters: int
  num_layers: int
  embed_dim: int
  vocab_size: int
  precision: str
  depths: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFacts:
  """Held-out text.

  Attributes:
    tasks: names of its tasks.
    digest: names texts, split and tokenizer together.
    tokens: targets that were scored.
    held_out_tokens: targets there are.
    length: tokens in a row.
    bytes_per_token: UTF-8 bytes per target, over all held-out text.
  """

  tasks: tuple[str, ...]
  digest: str
  tokens: int
  held_out_tokens: int
  length: int
  bytes_per_token: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineFacts:
  """Where times were taken, and when.

  Attributes:
    processor: the CPU's name.
    cores: how many of its cores this process may use.
    device: the kind of device that computed.
    devices: how many of them.
    mesh: sizes of the mesh axes.
    python: version.
    jax: version.
    date: UTC, ISO 8601.
  """

  processor: str
  cores: int
  device: str
  devices: int
  mesh: str
  python: str
  jax: str
  date: str


def model_facts(loaded: LoadedModel) -> ModelFacts:
  """Facts of a loaded model."""
  config = loaded.model.config
  return ModelFacts(
    directory=str(loaded.directory),
    step=loaded.step,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
    num_layers=config.num_layers,
    embed_dim=config.embed_dim,
    vocab_size=config.vocab_size,
    precision=config.precision.value,
    depths=config.depths,
  )


def data_facts(data: Data, *, tokens: int) -> DataFacts:
  """Facts of the text, of which `tokens` targets were scored."""
  held_out = data.stats.held_out
  return DataFacts(
    tasks=tuple(task.name for task in data.stats.tasks),
    digest=data.digest,
    tokens=tokens,
    held_out_tokens=held_out.targets,
    length=data.config.length,
    bytes_per_token=held_out.bytes_per_target,
  )


def machine_facts(mesh: Mesh) -> MachineFacts:
  """Facts of this machine, now."""
  now = datetime.datetime.now(datetime.UTC)
  return MachineFacts(
    processor=_processor(),
    cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1,
    device=mesh.devices.flat[0].device_kind,
    devices=mesh.devices.size,
    mesh=' x '.join(f'{axis}={size}' for axis, size in mesh.shape.items()),
    python=platform.python_version(),
    jax=jax.__version__,
    date=now.isoformat(timespec='seconds'),
  )


def _processor() -> str:
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return names[0] if names else platform.processor() or platform.machine()
