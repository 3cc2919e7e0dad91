from __future__ import annotations

import pytest

from exitax import data
from exitax.errors import UserError


def _task(name: str) -> data.Task:
  return data.Task(name=name, source=data.TextSource(('nowhere',)))


def test_default_corpus_is_registered():
  task = data.get('python_library')
  assert isinstance(task, data.Task)
  assert task.source == data.PythonLibrarySource()
  assert 'python_library' in data.TASKS.names()


def test_resolve_gives_a_mixture_of_values():
  registry = data.Registry()
  a, b = _task('a'), _task('b')
  registry.register(a)
  mixture = data.Mixture(
    name='ab', tasks=(data.WeightedTask(task='a', weight=3), data.WeightedTask(task=b))
  )
  registry.register(mixture)
  assert [(w.task, w.weight) for w in registry.resolve('ab').tasks] == [(a, 3), (b, 1)]
  assert registry.resolve(a) == registry.resolve('a')
  assert [(w.task, w.weight) for w in registry.resolve(a).tasks] == [(a, 1)]


def test_unknown_name_lists_known_and_closest():
  with pytest.raises(
    UserError, match=r"unknown task or mixture 'python_libary'; did you mean 'python_library'\?"
  ):
    data.get('python_libary')
  with pytest.raises(UserError, match=r'\(known: none\)'):
    data.Registry().get('x')


def test_registering_again():
  registry = data.Registry()
  registry.register(_task('a'))
  registry.register(_task('a'))
  with pytest.raises(UserError, match="'a' is registered already"):
    registry.register(data.Task(name='a', source=data.PythonLibrarySource()))


@pytest.mark.parametrize('weight', [0.0, -1.0, float('nan'), float('inf')])
def test_weight_must_be_positive(weight):
  with pytest.raises(UserError, match=f"weight={weight} of task 'a'"):
    data.Mixture(name='m', tasks=(data.WeightedTask(task='a', weight=weight),))


def test_mixtures_that_make_no_sense():
  with pytest.raises(UserError, match='has no tasks'):
    data.Mixture(name='m', tasks=())
  with pytest.raises(UserError, match='mixture=5 is no task or mixture'):
    data.resolve(5)  # type: ignore[arg-type]
  registry = data.Registry()
  twice = data.Mixture(name='m', tasks=(data.WeightedTask(_task('a')),) * 2)
  with pytest.raises(UserError, match="names task 'a' twice"):
    registry.resolve(twice)
  registry.register(twice)
  nested = data.Mixture(name='n', tasks=(data.WeightedTask('m'),))
  with pytest.raises(UserError, match="contains the mixture 'm'"):
    registry.resolve(nested)
