"""How a model's makers want it to be sampled: MODEL_DIR/generation.json, where there is one.

`exitax convert from-hf` writes it from `generation_config.json`; it may be written or changed by hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from exitax.checkpoint.artifacts import read_json, write_json_atomic
from exitax.checkpoint.errors import CheckpointError

SAMPLING_FILE = 'generation.json'
# Fields of `decode.Sampler`, with the types that JSON must have for them.
_FIELDS = {
  'temperature': (int, float),
  'top_k': (int,),
  'top_p': (int, float),
  'min_p': (int, float),
}


def write_sampling(model_dir: str | os.PathLike[str], settings: Mapping[str, float]) -> None:
  """Writes `generation.json`: any of temperature, top_k, top_p and min_p."""
  write_json_atomic(Path(model_dir) / SAMPLING_FILE, dict(settings))


def load_sampling(model_dir: str | os.PathLike[str]) -> dict[str, float]:
  """What `generation.json` says: fields of `decode.Sampler`; empty without such a file.

  Raises:
    CheckpointError: it is damaged, or holds something else.
  """
  path = Path(model_dir) / SAMPLING_FILE
  if not path.exists():
    return {}
  content = read_json(path)
  if not isinstance(content, dict):
    raise CheckpointError(
      f'{path} is not an object: give any of {", ".join(_FIELDS)}, or delete it'
    )
  for name, value in content.items():
    if name not in _FIELDS:
      raise CheckpointError(f'{path} has {name}: known are {", ".join(_FIELDS)}; remove it')
    if isinstance(value, bool) or not isinstance(value, _FIELDS[name]):
      raise CheckpointError(f'{path}: {name}={value!r} is not a number of its kind: mend it')
  return content
