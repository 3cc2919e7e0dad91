"""How long a conversion takes, what memory it needs, and whether the model is still the same.

  python benchmarks/convert.py [--quick | --full]

A synthetic checkpoint of the shape of Llama 3.2 1B (random bfloat16) goes through `exitax convert
from-hf`, each time in a process of its own. Beside it, in turns, safetensors reads every byte of it and
writes them with `save_file` and fsync. Scores are compared with transformers on a small model of the
same kind in float32.

Memory is anonymous resident memory (RssAnon; pages of the mapped files, which the system can drop, are
not of it) of the process that converts, looked at every 2 ms. `before` is what interpreter, libraries
and a started backend take before the conversion begins, `peak` the most while it runs, `above` the
difference. memory_ratio is the whole peak, interpreter and libraries included, over the bytes of the
largest tensor; the arrays that are wanted would be subtracted, but a conversion holds none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Effort, Goal, effort_from_arguments, finish, in_turns, median_ratio, say

from exitax.convert import (
  from_huggingface,
  huggingface_config,
  load_huggingface,
  open_source,
)
from exitax.convert.safetensors_file import DTYPES, write_file
from exitax.convert.tensors import tensor_places
from exitax.layers import RopeConfig, RopeScaling
from exitax.models import ModelConfig, logits_at_exits
from exitax.parallel import MeshConfig, ShardingRules, make_mesh

ROPE = RopeConfig(theta=500_000.0, scaling=RopeScaling.LLAMA3, factor=32.0, original_length=64)
SMALL = ModelConfig(
  vocab_size=264,
  num_layers=4,
  embed_dim=64,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=192,
  max_length=512,
  rope=ROPE,
  tie_embeddings=False,
)
ONE_BILLION = ModelConfig(
  vocab_size=128_256,
  num_layers=16,
  embed_dim=2048,
  num_heads=32,
  num_kv_heads=8,
  mlp_dim=8192,
  max_length=8192,
  rope=dataclasses.replace(ROPE, original_length=8192),
)
QUICK = dataclasses.replace(ONE_BILLION, vocab_size=32_000, num_layers=4)
REPEATS = {Effort.QUICK: 1, Effort.NORMAL: 5, Effort.FULL: 9}
SAMPLE_SECONDS = 0.002


def main() -> None:
  """Measures both ways in turns."""
  if sys.argv[1:2] == ['--child']:
    _child(*sys.argv[2:])
    return
  effort = effort_from_arguments(__doc__)
  config = QUICK if effort is Effort.QUICK else ONE_BILLION
  with tempfile.TemporaryDirectory(prefix='exitax-convert-') as name:
    scratch = Path(name)
    say('writing the checkpoint')
    write_checkpoint(scratch / 'hf', config, dtype='BF16')
    reports: dict[str, list[dict[str, float]]] = {'convert': [], 'copy': []}

    def measure(way: str) -> float:
      reports[way].append(_run(way, scratch))
      return reports[way][-1]['seconds']

    seconds = in_turns({way: lambda way=way: measure(way) for way in reports}, REPEATS[effort])
    say('scores beside those of transformers')
    error = logit_error(scratch / 'small')
  wanted, largest = _sizes(config)
  peaks = {way: statistics.median(r['peak_bytes'] for r in reports[way]) for way in reports}
  rows = [
    {
      'way': way,
      'seconds': statistics.median(seconds[way]),
      'GB/s': wanted / 1e9 / statistics.median(seconds[way]),
      'peak, MB': peaks[way] / 1e6,
      'before, MB': statistics.median(r['base_bytes'] for r in reports[way]) / 1e6,
      'above, MB': statistics.median(r['peak_bytes'] - r['base_bytes'] for r in reports[way]) / 1e6,
    }
    for way in reports
  ]
  goals = [
    Goal(
      name='time_ratio', value=median_ratio(seconds['convert'], seconds['copy']), op='<=', goal=1.5
    ),
    Goal(name='memory_ratio', value=peaks['convert'] / largest, op='<=', goal=1.2),
    Goal(name='max_logit_error', value=error, op='<=', goal=1e-4),
  ]
  finish('convert', rows, goals)


def write_checkpoint(folder: Path, config: ModelConfig, *, dtype: str, std: float = 0.02) -> None:
  """A Hugging Face folder with random weights."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  kind = DTYPES[dtype]

  def pieces(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    rows = max(1, 4_000_000 // max(int(np.prod(shape[1:])), 1))
    for start in range(0, shape[0], rows):
      size = (min(rows, shape[0] - start), *shape[1:])
      yield (rng.standard_normal(size, np.float32) * std).astype(kind)

  places = [place for group in tensor_places(config).values() for place in group]
  write_file(
    folder / 'model.safetensors',
    [(place.name, dtype, place.shape, pieces(place.shape)) for place in places],
    metadata={'format': 'pt'},
  )
  torch_name = {'BF16': 'bfloat16', 'F32': 'float32'}[dtype]
  content = huggingface_config(config, dtype=torch_name)
  (folder / 'config.json').write_text(json.dumps(content))
  _write_tokenizer(folder, config.vocab_size)


def logit_error(folder: Path) -> float:
  """Largest difference of a score from transformers' in float32."""
  import torch
  import transformers

  write_checkpoint(folder, SMALL, dtype='F32', std=0.2)
  loaded = load_huggingface(open_source(folder), mesh=_mesh(), rules=ShardingRules())
  tokens = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 256))
  ours = logits_at_exits(
    loaded.model,
    loaded.params,
    jnp.asarray(tokens),
    jnp.ones(tokens.shape, jnp.int32),
    jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
  )[-1]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    return float(np.abs(np.asarray(ours) - theirs(torch.asarray(tokens)).logits.numpy()).max())


def _mesh() -> jax.sharding.Mesh:
  return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def _sizes(config: ModelConfig) -> tuple[int, int]:
  """Bytes of all tensors and of the largest, in bfloat16."""
  sizes = [
    2 * int(np.prod(place.shape)) for group in tensor_places(config).values() for place in group
  ]
  return sum(sizes), max(sizes)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
  """A tokenizer of so many ids."""
  import tokenizers

  vocabulary = {f'<{i}>': i for i in range(vocab_size - 1)} | {'</s>': vocab_size - 1}
  model = tokenizers.models.WordLevel(vocabulary, unk_token='<0>')
  tokenizers.Tokenizer(model).save(str(folder / 'tokenizer.json'))


# One measurement, in a process of its own.


def _run(way: str, scratch: Path) -> dict[str, float]:
  out = scratch / 'out'
  command = [sys.executable, __file__, '--child', way, str(scratch / 'hf'), str(out)]
  result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  shutil.rmtree(out)
  return json.loads(result.stdout.splitlines()[-1])


def _child(way: str, source: str, out: str) -> None:
  act = {'convert': _convert, 'copy': _copy}[way]
  jax.device_put(jnp.zeros(())).block_until_ready()
  base = _anonymous()
  peak, done = base, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(SAMPLE_SECONDS):
      peak = max(peak, _anonymous())

  watcher = threading.Thread(target=watch)
  watcher.start()
  start = time.perf_counter()
  act(source, out)
  seconds = time.perf_counter() - start
  done.set()
  watcher.join()
  print(json.dumps({'seconds': seconds, 'peak_bytes': peak, 'base_bytes': base}))


def _convert(source: str, out: str) -> None:
  from_huggingface(open_source(source), out)


def _copy(source: str, out: str) -> None:
  from safetensors.torch import load_file, save_file

  Path(out).mkdir()
  tensors = load_file(Path(source) / 'model.safetensors')
  target = Path(out) / 'model.safetensors'
  save_file(tensors, target)
  descriptor = os.open(target, os.O_RDONLY)
  os.fsync(descriptor)
  os.close(descriptor)


def _anonymous() -> int:
  """Bytes of anonymous resident memory of this process."""
  status: Any = Path('/proc/self/status').read_text()
  line = next(line for line in status.splitlines() if line.startswith('RssAnon'))
  return int(line.split()[1]) * 1024


if __name__ == '__main__':
  main()
