"""Decoding: one state, one primitive (`extend`), one loop; policies plug in."""

# The front.
# State.
from exitax.decode.cache import KVCache, LayerCache, init_cache, truncate, write_layer

# Policies.
from exitax.decode.confidence import Confidence

# The primitive and the loop.
from exitax.decode.extend import Extension, extend
from exitax.decode.generate import begin, generate, make_requests, prepare_params, stream
from exitax.decode.lanes import Causal, KeyColumns, Lanes, Visibility, consecutive_lanes
from exitax.decode.loop import prefill_chunk, run_steps, step
from exitax.decode.policies import DeferredExit, ExitPlan, ExitPolicy, FullDepth, Record
from exitax.decode.results import Completion, GenerateResult, StreamEvent, completions_since
from exitax.decode.sampler import Sampler, choose_tokens, filter_logits, token_key
from exitax.decode.state import (
  Agreement,
  DecodeState,
  ExitRecord,
  Requests,
  StopReason,
  gather_rows,
  init_state,
)

__all__ = [
  'Agreement',
  'Causal',
  'Completion',
  'Confidence',
  'DecodeState',
  'DeferredExit',
  'ExitPlan',
  'ExitPolicy',
  'ExitRecord',
  'Extension',
  'FullDepth',
  'GenerateResult',
  'KVCache',
  'KeyColumns',
  'Lanes',
  'LayerCache',
  'Record',
  'Requests',
  'Sampler',
  'StopReason',
  'StreamEvent',
  'Visibility',
  'begin',
  'choose_tokens',
  'completions_since',
  'consecutive_lanes',
  'extend',
  'filter_logits',
  'gather_rows',
  'generate',
  'init_cache',
  'init_state',
  'make_requests',
  'prefill_chunk',
  'prepare_params',
  'run_steps',
  'step',
  'stream',
  'token_key',
  'truncate',
  'write_layer',
]
