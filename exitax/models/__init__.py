"""The early-exit language model: configuration, parameters, objective-free forward passes."""

# Configuration.
from exitax.models.config import ExitConfig, ExitMatrix, ModelConfig, Remat

# What training drops.
from exitax.models.dropout import Dropout, DropoutConfig, with_rows

# The model.
from exitax.models.exit_lm import ExitLM, Params

# Cache-free forward passes.
from exitax.models.forward import features_at_exits, logits_at_exits, packed_attend, packed_mask

# The model cut into spans, for pipelines.
from exitax.models.stages import StagePlan, plan_stages, run_span, stack_spans

__all__ = [
  'Dropout',
  'DropoutConfig',
  'ExitConfig',
  'ExitLM',
  'ExitMatrix',
  'ModelConfig',
  'Params',
  'Remat',
  'StagePlan',
  'features_at_exits',
  'logits_at_exits',
  'packed_attend',
  'packed_mask',
  'plan_stages',
  'run_span',
  'stack_spans',
  'with_rows',
]
