"""Problems for groups of thinkers: generators without end, exact scores, and teachers that see what the mask shows."""

from exitax.data.group_tasks.clock import Seen, Teacher, simulate
from exitax.data.group_tasks.enumeration import Enumeration, EnumerationTask
from exitax.data.group_tasks.graphs import (
  FloydWarshall,
  FloydWarshallTask,
  TreeSum,
  TreeSumTask,
)
from exitax.data.group_tasks.template import Template, TemplateTask
from exitax.data.group_tasks.units import (
  ABORT,
  WAIT,
  Problem,
  Task,
  Writing,
  claimed_in,
  duplicate_share,
  union_coverage,
  units_in,
)

__all__ = [
  'ABORT',
  'WAIT',
  'Enumeration',
  'EnumerationTask',
  'FloydWarshall',
  'FloydWarshallTask',
  'Problem',
  'Seen',
  'Task',
  'Teacher',
  'Template',
  'TemplateTask',
  'TreeSum',
  'TreeSumTask',
  'Writing',
  'claimed_in',
  'duplicate_share',
  'simulate',
  'union_coverage',
  'units_in',
]
