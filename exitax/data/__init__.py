"""Data: tasks, sources, tokenizers, packing, and loaders with resumable state.

Importing this needs jax and numpy alone; `tokenizers`, `grain` and `tensorflow_datasets` are
imported by what uses them.
"""

from exitax.data.batch import Batch, Origins, empty_row, stack_rows
from exitax.data.build import Data, DataConfig, build_data
from exitax.data.cache import cache_root
from exitax.data.evaluation import EvalLoader
from exitax.data.group_data import (
  GROUP_TASKS,
  GroupData,
  GroupDataConfig,
  build_group_data,
  find_group_task,
)
from exitax.data.group_rows import GroupMix, GroupRows
from exitax.data.huggingface import BpeTokenizer, HuggingFaceTokenizer
from exitax.data.jsonl import JsonlSource
from exitax.data.loader import TrainLoader, TrainRows
from exitax.data.packing import PackedRows, TokenStream, pad_documents, token_stream
from exitax.data.progress import Progress, progress_bar, quiet
from exitax.data.shard import Shard, Shards, shards_of_blocks
from exitax.data.sources import (
  Document,
  PythonLibrarySource,
  Source,
  TextSource,
  corpus_digest,
  read_documents,
)
from exitax.data.splits import Split, SplitConfig, split_documents
from exitax.data.stats import CorpusStats, PartStats, TaskStats
from exitax.data.streaming import StreamDecoder
from exitax.data.tasks import (
  TASKS,
  Mixture,
  Registry,
  Task,
  WeightedTask,
  get,
  register,
  resolve,
)
from exitax.data.tfds_source import TfdsSource
from exitax.data.think_template import ThinkTemplate
from exitax.data.tokenizers import (
  ByteTokenizer,
  Tokenizer,
  begin_prompt,
  check_tokenizer,
  encode_prompt,
  load_tokenizer,
  start_id,
)
from exitax.data.vocabulary import BpeVocabulary, ByteVocabulary, SavedVocabulary, Vocabulary

__all__ = [
  # One call.
  'Data',
  'DataConfig',
  'build_data',
  'BpeVocabulary',
  'ByteVocabulary',
  'SavedVocabulary',
  'Vocabulary',
  # Groups of thinkers.
  'GROUP_TASKS',
  'GroupData',
  'GroupDataConfig',
  'GroupMix',
  'GroupRows',
  'ThinkTemplate',
  'build_group_data',
  'find_group_task',
  # Batches and packing.
  'Batch',
  'Origins',
  'PackedRows',
  'TokenStream',
  'empty_row',
  'pad_documents',
  'stack_rows',
  'token_stream',
  # Loaders.
  'EvalLoader',
  'Shard',
  'Shards',
  'shards_of_blocks',
  'TrainLoader',
  'TrainRows',
  # Tasks.
  'TASKS',
  'Mixture',
  'Registry',
  'Task',
  'WeightedTask',
  'get',
  'register',
  'resolve',
  # Sources.
  'Document',
  'JsonlSource',
  'PythonLibrarySource',
  'Source',
  'TextSource',
  'TfdsSource',
  'corpus_digest',
  'read_documents',
  # Held-out split.
  'Split',
  'SplitConfig',
  'split_documents',
  # Tokenizers.
  'BpeTokenizer',
  'ByteTokenizer',
  'HuggingFaceTokenizer',
  'StreamDecoder',
  'Tokenizer',
  'begin_prompt',
  'check_tokenizer',
  'encode_prompt',
  'load_tokenizer',
  'start_id',
  # Numbers, cache, progress.
  'CorpusStats',
  'PartStats',
  'Progress',
  'TaskStats',
  'cache_root',
  'progress_bar',
  'quiet',
]
