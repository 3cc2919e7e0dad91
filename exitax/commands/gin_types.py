"""Whether a value in a gin file is of the kind that a parameter's annotation says."""

from __future__ import annotations

import collections.abc
import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

_NOTHING = type(None)
_WORDS = {
  int: 'a whole number',
  float: 'a number',
  bool: 'True or False',
  str: 'a text in quotes',
  _NOTHING: 'None',
}
_SEQUENCES = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


@functools.cache
def parameter_types(kind: Callable[..., Any]) -> Mapping[str, Any]:
  """The annotation of every parameter of a class or function, by name."""
  hints = typing.get_type_hints(kind)
  if inspect.isclass(kind):
    # A class that is no dataclass annotates its `__init__` alone.
    hints = {**typing.get_type_hints(kind.__init__), **hints}
  names = inspect.signature(kind).parameters
  return {name: hints.get(name, Any) for name in names}


def allows(annotation: Any, value: Any, *, is_reference: Callable[[Any], bool]) -> bool:
  """Whether a file may write `value` for an annotation; what references give is not known here.

  Args:
    annotation: as `parameter_types` gives it.
    value: a Python literal, or a reference of gin's, which may also stand within it.
    is_reference: tells references from literals.
  """
  check = functools.partial(allows, is_reference=is_reference)
  if is_reference(value) or annotation is Any:
    return True
  if choices := _choices(annotation):
    return any(check(choice, value) for choice in choices)
  origin, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
  if origin in _SEQUENCES:
    if not isinstance(value, (tuple, list)):
      return False
    if origin is not tuple or inner[-1] is ...:
      return all(check(inner[0], item) for item in value)
    return len(inner) == len(value) and all(map(check, inner, value))
  if origin in _MAPPINGS:
    return isinstance(value, Mapping)
  if _is_enum(origin):
    return isinstance(value, (origin, str))  # Whose values are checked where they are read.
  if origin is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if origin is int:
    return isinstance(value, int) and not isinstance(value, bool)
  # All that is left is made by something: a literal is none of it.
  return origin in _WORDS and isinstance(value, origin)


def described(annotation: Any) -> str:
  """What to write, in words."""
  if choices := _choices(annotation):
    named = any(_is_enum(choice) for choice in choices)  # Then `str` is for their names.
    wanted = [choice for choice in choices if not (named and choice is str)]
    return ' or '.join(dict.fromkeys(described(choice) for choice in wanted))
  origin, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
  if origin in _SEQUENCES:
    items = ', '.join('...' if item is ... else described(item) for item in inner)
    return f'({items})' if origin is tuple else f'({items}, ...)'
  if origin in _MAPPINGS:
    return 'a dictionary'
  if _is_enum(origin):
    return ' or '.join(repr(member.value) for member in origin)
  if origin in _WORDS:
    return _WORDS[origin]
  made = inspect.isclass(origin) and not getattr(origin, '_is_protocol', False)
  return f'@{origin.__name__}()' if made else 'a name with @'


def _is_enum(annotation: Any) -> bool:
  return inspect.isclass(annotation) and issubclass(annotation, enum.Enum)


def _choices(annotation: Any) -> tuple[Any, ...]:
  unions = (typing.Union, types.UnionType)
  return typing.get_args(annotation) if typing.get_origin(annotation) in unions else ()
