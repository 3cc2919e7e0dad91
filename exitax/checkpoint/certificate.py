"""A certificate: an exit threshold whose loss was bounded on data, for one checkpoint and no other.

`exitax calibrate` writes MODEL_DIR/certificate.json; `generate --threshold=certified` uses it. It names the
checkpoint by the SHA-256 of its manifest, which lists the SHA-256 of every array, so a certificate
never outlives the weights that it was made for. It carries a digest of itself: a threshold changed by
hand is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exitax.checkpoint.artifacts import checkpoints_directory, read_json, write_json_atomic
from exitax.checkpoint.errors import CheckpointError
from exitax.checkpoint.folders import StepFolders
from exitax.checkpoint.manifest import MANIFEST_NAME
from exitax.errors import UserError

FORMAT = 1
CERTIFICATE_FILE = 'certificate.json'
CERTIFIED = 'certified'  # The threshold that stands for the one in the model's certificate.
# These give the same tokens for the same thresholds, so one certificate serves all of them.
EXACT_STRATEGIES = ('deferred', 'recompute', 'pipeline')
_DEFAULTS = {'patience': 2, 'decay': 0.0, 'weights': 'compute', 'kv_cache': 'compute'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
  """What was certified, for what, and on which evidence.

  Attributes:
    statement: the guarantee in plain words.
    metric: the loss.
    risk: limit of the expected loss.
    confidence: probability that the guarantee holds; None for conformal risk control.
    method: 'ltt' or 'crc'.
    threshold: to use at every exit.
    measure: of confidence, which is compared with the threshold.
    strategy: how skipped layers were filled.
    exit_layers: the exits in use.
    examples: sequences behind it.
    population: what they were drawn from.
    examples_digest: SHA-256 of their token ids, in order.
    rows: per threshold: risk, bound, p-value, layers per token.
    settings: of decoding: `max_new_tokens`, `temperature`, ...
    checkpoint_step: step of the weights.
    checkpoint_digest: SHA-256 of the step's manifest.
    versions: of Python and libraries.
    created: UTC, ISO 8601.
  """

  statement: str
  metric: str
  risk: float
  confidence: float | None
  method: str
  threshold: float
  measure: str
  strategy: str
  exit_layers: tuple[int, ...]
  examples: int
  population: str
  examples_digest: str
  rows: tuple[Mapping[str, Any], ...]
  settings: Mapping[str, Any]
  checkpoint_step: int
  checkpoint_digest: str
  versions: Mapping[str, str]
  created: str

  def check_use(
    self,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    strategy: str | None = None,
    measure: str | None = None,
    patience: int = 2,
    decay: float = 0.0,
    weights: str = 'compute',
    kv_cache: str = 'compute',
  ) -> None:
    """Makes sure that a request is one that the certificate speaks of.

    Args:
      max_new_tokens: tokens to generate at most.
      temperature: of sampling; 0 is greedy.
      strategy: how skipped layers are filled; None asks for the certificate's.
      measure: of confidence; None asks for the certificate's.
      patience: exits that must agree, for that measure.
      decay: how fast thresholds fall with the tokens.
      weights: format of the matrices, 'compute' or 'int8'.
      kv_cache: format of keys and values, likewise.

    Raises:
      UserError: it is not; names the value, the certificate's, and the way out.
    """
    if temperature > 0:
      raise UserError(
        f'temperature={temperature:g}: the certificate is for greedy decoding; use temperature=0, or give '
        'a threshold as a number, without a guarantee'
      )
    limit = int(self.settings['max_new_tokens'])
    if max_new_tokens > limit:
      raise UserError(
        f'max_new_tokens={max_new_tokens}: the certificate is for at most {limit} new tokens; ask for '
        f'fewer, or calibrate again with --max_new_tokens={max_new_tokens}'
      )
    alike = EXACT_STRATEGIES if self.strategy in EXACT_STRATEGIES else (self.strategy,)
    if strategy not in (None, *alike):
      raise UserError(
        f'strategy={strategy}: the certificate is for {", ".join(alike)}; choose one of them, or '
        'calibrate again with that strategy'
      )
    if measure not in (None, self.measure):
      raise UserError(
        f'confidence={measure}: the certificate is for {self.measure}; leave it out, or calibrate again '
        f'with --measure={measure}'
      )
    asked = {'patience': patience, 'decay': decay, 'weights': weights, 'kv_cache': kv_cache}
    for name, value in asked.items():
      # What a certificate does not mention was left as it is by default.
      certified = self.settings.get(name, _DEFAULTS[name])
      if value != certified:
        raise UserError(f'{name}={value}: the certificate is for {name}={certified}; leave it out')


def checkpoint_digest(model_dir: str | os.PathLike[str], *, step: int) -> str:
  """SHA-256 (hex) of a finished step's manifest, which names every byte of its arrays.

  Raises:
    CheckpointError: no such step, or its manifest cannot be read.
  """
  root = checkpoints_directory(model_dir).absolute()
  folder = StepFolders(root).finished().get(step)
  if folder is None:
    raise CheckpointError(f'{root} holds no finished step {step}: choose another step')
  try:
    return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
  except OSError as error:
    raise CheckpointError(
      f'{folder / MANIFEST_NAME} cannot be read ({error.strerror}): mend its permissions'
    ) from error


def write_certificate(model_dir: str | os.PathLike[str], certificate: Certificate) -> Path:
  """Writes `certificate.json` beside the checkpoints, whole or not at all; returns its path.

  Raises:
    OSError: the directory is not writable or the disk is full; an older certificate then stays.
  """
  # Through JSON first: the digest must be that of what is read back.
  content = json.loads(json.dumps({'format': FORMAT, **dataclasses.asdict(certificate)}))
  path = Path(model_dir) / CERTIFICATE_FILE
  write_json_atomic(path, {**content, 'digest': _digest(content)})
  return path


def load_certificate(
  model_dir: str | os.PathLike[str], *, step: int, exits: Sequence[int]
) -> Certificate:
  """The certificate of a model directory, for the weights of `step` and its exits after layers `exits`.

  Raises:
    UserError: there is none, it was changed or damaged, or it is for other weights or exits.
  """
  path = Path(model_dir) / CERTIFICATE_FILE
  if not path.exists():
    raise UserError(
      f'{model_dir} has no certificate: make one with `exitax calibrate --model_dir={model_dir}`, or '
      'give the threshold as a number'
    )
  certificate = _parse(path)
  found = checkpoint_digest(model_dir, step=step)
  if certificate.checkpoint_digest != found:
    raise UserError(
      f'{path} is for the checkpoint of step {certificate.checkpoint_step} '
      f'({certificate.checkpoint_digest[:12]}), the model in use is step {step} ({found[:12]}): '
      'calibrate again'
    )
  if certificate.exit_layers != tuple(exits):
    certified, used = (','.join(map(str, x)) for x in (certificate.exit_layers, exits))
    raise UserError(
      f'{path} is for exits after layers {certified}, those in use are {used or "none"}: use '
      f'--exits={certified}, or calibrate again with --exits={used}'
    )
  return certificate


def _parse(path: Path) -> Certificate:
  again = 'calibrate again'
  content = read_json(path)
  if not isinstance(content, dict) or content.get('format') != FORMAT:
    raise CheckpointError(f'{path} is not a certificate of format {FORMAT}: {again}')
  recorded = content.pop('digest', None)
  if recorded != _digest(content):
    raise CheckpointError(f'{path} was changed or damaged since it was written: {again}')
  del content['format']
  content['exit_layers'], content['rows'] = tuple(content['exit_layers']), tuple(content['rows'])
  try:
    return Certificate(**content)
  except TypeError as error:
    raise CheckpointError(f'{path} lacks a field or has one too many ({error}): {again}') from error


def _digest(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
