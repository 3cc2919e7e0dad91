"""Hugging Face models in and out, weights streamed through mapped memory; exits in a file beside."""

from exitax.convert.exporting import to_huggingface
from exitax.convert.families import ARCHITECTURES, huggingface_config, model_config
from exitax.convert.folder import HuggingFaceFolder, open_folder
from exitax.convert.importing import Source, from_huggingface, load_huggingface, open_source
from exitax.convert.peft import from_peft, to_peft
from exitax.convert.safetensors_file import TensorEntry, dtype_name, read_header, write_file
from exitax.convert.saving import write_variant
from exitax.convert.writing import SHARD_BYTES

__all__ = [
  # In.
  'HuggingFaceFolder',
  'Source',
  'from_huggingface',
  'load_huggingface',
  'open_folder',
  'open_source',
  # Out.
  'SHARD_BYTES',
  'to_huggingface',
  # Adapters.
  'from_peft',
  'to_peft',
  'write_variant',
  # Architectures.
  'ARCHITECTURES',
  'huggingface_config',
  'model_config',
  # Files.
  'TensorEntry',
  'dtype_name',
  'read_header',
  'write_file',
]
