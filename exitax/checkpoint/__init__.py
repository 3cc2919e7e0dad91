"""Checkpoints that are committed whole, verified before use, and restored onto any mesh.

The only folder that imports Orbax.
"""

from __future__ import annotations

from exitax.checkpoint.artifacts import (
  checkpoints_directory,
  read_json,
  write_bytes_atomic,
  write_json_atomic,
)
from exitax.checkpoint.certificate import (
  CERTIFICATE_FILE,
  CERTIFIED,
  Certificate,
  checkpoint_digest,
  load_certificate,
  write_certificate,
)
from exitax.checkpoint.classifiers import CLASSIFIER_FILE, load_classifiers, write_classifiers
from exitax.checkpoint.config import BestMode, CheckpointConfig
from exitax.checkpoint.errors import CheckpointError
from exitax.checkpoint.lazy import Box, LazyArray
from exitax.checkpoint.manager import CheckpointManager
from exitax.checkpoint.model_dir import (
  LoadedModel,
  load_model,
  read_model,
  tokenizer_directory,
  write_model,
)
from exitax.checkpoint.reading import CheckpointInfo, Restored
from exitax.checkpoint.sampling import SAMPLING_FILE, load_sampling, write_sampling
from exitax.checkpoint.tree import LeafSpec

__all__ = [
  'CERTIFIED',
  # Saving and restoring
  'BestMode',
  'Box',
  'CheckpointConfig',
  'CheckpointInfo',
  'CheckpointManager',
  'LazyArray',
  'LeafSpec',
  'Restored',
  # Files of a model directory
  'LoadedModel',
  'load_model',
  'read_model',
  'tokenizer_directory',
  'write_model',
  'checkpoints_directory',
  'read_json',
  'write_bytes_atomic',
  'write_json_atomic',
  # How it is sampled
  'SAMPLING_FILE',
  'load_sampling',
  'write_sampling',
  # Learned confidence
  'CLASSIFIER_FILE',
  'load_classifiers',
  'write_classifiers',
  # Certified thresholds
  'CERTIFICATE_FILE',
  'Certificate',
  'checkpoint_digest',
  'load_certificate',
  'write_certificate',
  # Errors
  'CheckpointError',
]
