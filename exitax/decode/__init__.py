"""Decoding: one state, one primitive (`extend`), one loop; policies plug in."""

# The front.
# State.
# Policies.
from exitax.decode.acceptance import Acceptance
from exitax.decode.cache import (
  CacheFormat,
  KVCache,
  LayerCache,
  init_cache,
  truncate,
  write_layer,
)
from exitax.decode.commit import commit
from exitax.decode.confidence import OF_SCORES, Confidence, classifier_logit, cosine
from exitax.decode.depth import ExitPlan
from exitax.decode.draft_choice import (
  DraftCosts,
  DraftStats,
  draft_buckets,
  estimate_costs,
  tokens_per_round,
)

# The primitive and the loop.
from exitax.decode.extend import Extension, extend
from exitax.decode.generate import begin, generate, make_requests, stream
from exitax.decode.groups import (
  Group,
  Sees,
  Spare,
  ThinkConfig,
  Thinker,
  begin_groups,
  policy_for,
)
from exitax.decode.joining import GIVEN, NewText, give_tokens, start_text, stop_texts
from exitax.decode.lanes import Causal, InGroups, KeyColumns, Lanes, Visibility, consecutive_lanes
from exitax.decode.loop import prefill_chunk, run_steps, step
from exitax.decode.pipeline import TICKS, PipelinePlan
from exitax.decode.placement import LocalPlacement, LocalPlan
from exitax.decode.plan import Agreement, Gain, Placement, Record, StepPlan, TokenScores
from exitax.decode.policies import (
  CopyStateExit,
  DeferredExit,
  ExitPolicy,
  FullDepth,
  PipelineExit,
  RecomputeExit,
  Speculative,
  ThresholdExit,
)
from exitax.decode.prepare import WeightFormat, prepare_params
from exitax.decode.results import Completion, GenerateResult, StreamEvent, completions_since
from exitax.decode.sampler import Sampler, choose_tokens, filter_logits, token_key
from exitax.decode.segments import Filling
from exitax.decode.singles import run_singles

# Slots that requests take and leave.
from exitax.decode.slots import (
  CacheChunk,
  Gains,
  NewGroup,
  empty_grouping,
  insert_group,
  insert_row,
  read_chunk,
  read_gains,
  release_rows,
  write_chunk,
)
from exitax.decode.speculation import FORCED, STATS, DraftPlan
from exitax.decode.stage_placement import StagedPlacement
from exitax.decode.state import (
  DecodeState,
  ExitRecord,
  Requests,
  StopReason,
  gather_rows,
  init_state,
)
from exitax.decode.strategies import Strategy, StrategySettings
from exitax.decode.texts import Grouping, Positions
from exitax.decode.thinking import GroupRun, think

__all__ = [
  'GIVEN',
  'NewGroup',
  'empty_grouping',
  'insert_group',
  'run_singles',
  'NewText',
  'give_tokens',
  'start_text',
  'stop_texts',
  'GroupRun',
  'Spare',
  'Positions',
  'Grouping',
  'commit',
  'InGroups',
  'think',
  'policy_for',
  'begin_groups',
  'ThinkConfig',
  'Thinker',
  'Sees',
  'Group',
  'Acceptance',
  'Agreement',
  'CacheChunk',
  'CacheFormat',
  'Causal',
  'Completion',
  'Confidence',
  'CopyStateExit',
  'DecodeState',
  'DeferredExit',
  'DraftCosts',
  'DraftPlan',
  'DraftStats',
  'ExitPlan',
  'ExitPolicy',
  'ExitRecord',
  'Extension',
  'FORCED',
  'Filling',
  'FullDepth',
  'Gain',
  'Gains',
  'GenerateResult',
  'KVCache',
  'KeyColumns',
  'Lanes',
  'LayerCache',
  'LocalPlacement',
  'LocalPlan',
  'OF_SCORES',
  'PipelineExit',
  'PipelinePlan',
  'Placement',
  'RecomputeExit',
  'Record',
  'Requests',
  'STATS',
  'Sampler',
  'Speculative',
  'StopReason',
  'StepPlan',
  'Strategy',
  'StrategySettings',
  'StagedPlacement',
  'StreamEvent',
  'TICKS',
  'ThresholdExit',
  'TokenScores',
  'Visibility',
  'WeightFormat',
  'begin',
  'choose_tokens',
  'classifier_logit',
  'completions_since',
  'consecutive_lanes',
  'cosine',
  'draft_buckets',
  'estimate_costs',
  'extend',
  'filter_logits',
  'gather_rows',
  'generate',
  'init_cache',
  'init_state',
  'insert_row',
  'make_requests',
  'prefill_chunk',
  'prepare_params',
  'read_chunk',
  'read_gains',
  'release_rows',
  'run_steps',
  'step',
  'stream',
  'token_key',
  'tokens_per_round',
  'truncate',
  'write_chunk',
  'write_layer',
]
