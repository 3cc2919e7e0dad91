"""Planning: what a training step takes on devices that may not be here, without running it."""

# By arithmetic.
# By the compiler.
from exitax.planning.compiled import CompiledMemory, CompiledStep, compile_step
from exitax.planning.costs import SpanCost, span_cost, traced_cost
from exitax.planning.estimate import Estimate, MemoryEstimate, TimeEstimate, estimate

# To look at.
from exitax.planning.picture import draw_schedule, draw_schedules, to_png

# Both.
from exitax.planning.plan import COMFORTABLE, Plan, make_plan
from exitax.planning.rendering import (
  render_compiled,
  render_larger,
  render_plan,
  render_search,
  render_timeline,
)
from exitax.planning.search import (
  Candidate,
  SearchResult,
  describe_layout,
  gin_bindings,
  layouts,
  rank_layouts,
  search,
  smallest_slice,
)

# Where.
from exitax.planning.target import Target, find_target

__all__ = [
  'COMFORTABLE',
  'Candidate',
  'CompiledMemory',
  'CompiledStep',
  'Estimate',
  'MemoryEstimate',
  'Plan',
  'SearchResult',
  'SpanCost',
  'Target',
  'TimeEstimate',
  'compile_step',
  'describe_layout',
  'draw_schedule',
  'draw_schedules',
  'estimate',
  'find_target',
  'gin_bindings',
  'layouts',
  'make_plan',
  'rank_layouts',
  'render_compiled',
  'render_larger',
  'render_plan',
  'render_search',
  'render_timeline',
  'search',
  'smallest_slice',
  'span_cost',
  'to_png',
  'traced_cost',
]
