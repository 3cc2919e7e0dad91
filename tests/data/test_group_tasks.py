"""Tasks for groups of thinkers: scored exactly, solved by teachers that know what the mask shows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitax.data.group_tasks import (
  ABORT,
  WAIT,
  Enumeration,
  EnumerationTask,
  FloydWarshallTask,
  Seen,
  Teacher,
  TemplateTask,
  TreeSum,
  TreeSumTask,
  claimed_in,
  duplicate_share,
  simulate,
  union_coverage,
  units_in,
)
from exitax.errors import UserError

TASKS = {
  'enumeration': EnumerationTask(num_items=12),
  'long items': EnumerationTask(num_items=12, item_length=3),
  'floyd_warshall': FloydWarshallTask(num_nodes=5),
  'tree_sum': TreeSumTask(depth=3),
  'template': TemplateTask(num_components=8),
}
ALONE = Seen(lag=1 << 30)


def rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


@pytest.mark.parametrize('name', TASKS)
def test_problems_come_from_their_seed(name):
  task = TASKS[name]
  problems = [task.problem(rng(seed)) for seed in (1, 1, 2)]
  assert problems[0] == problems[1] != problems[2]
  keys = [problems[0].key(unit) for unit in range(problems[0].num_units)]
  assert len(set(keys)) == len(keys)
  assert {len(key) for key in keys} == {problems[0].key_length}
  assert problems[0].prompt.endswith('\n') and problems[0].prompt.isascii()


@pytest.mark.parametrize('slip', [0.0, 0.3])
@pytest.mark.parametrize('thinkers', [1, 2, 5])
@pytest.mark.parametrize('name', TASKS)
def test_teachers_solve_every_problem(name, thinkers, slip):
  for seed in range(5):
    problem = TASKS[name].problem(rng(seed))
    teacher = Teacher(max_length=1000, slip=slip, stall=slip / 3)
    texts = simulate(problem, thinkers, rng(seed), teacher=teacher)
    assert union_coverage(problem, texts) == 1.0
    assert max(map(len, texts)) < 1000  # All have ended by themselves.
    if thinkers == 1:
      assert duplicate_share(problem, texts) == 0.0
      assert len(texts[0].replace(WAIT, '')) == problem.num_units * problem.unit_length


@pytest.mark.parametrize('name', TASKS)
def test_thinkers_that_see_each_other_are_sooner(name):
  def length(thinkers, seen):
    problem = TASKS[name].problem(rng(3))
    return max(
      map(len, simulate(problem, thinkers, rng(3), seen=seen, teacher=Teacher(max_length=1000)))
    )

  assert length(4, Seen()) < 0.75 * length(1, Seen())
  assert length(4, ALONE) == length(1, Seen())  # Each does everything.


def test_paths_are_the_shortest():
  for seed in range(20):
    problem = FloydWarshallTask(num_nodes=6, edge_share=0.4).problem(rng(seed))
    weights = np.where(np.asarray(problem.weights) < 0, np.inf, problem.weights)
    # The shortest walk of at most n edges, by brute products of (min, +).
    best = weights
    for _ in range(problem.size):
      best = np.min(best[:, :, None] + weights[None], axis=1)
    expected = np.where(np.isinf(best), -1, best)
    np.testing.assert_array_equal(problem.distances(), expected)


def test_sums_are_of_the_leaves():
  for seed in range(10):
    problem = TreeSumTask(depth=4).problem(rng(seed))
    assert int(problem.solution()[0][1:]) == sum(problem.leaves) % 100


def test_a_component_moves_with_what_it_uses():
  problem = TemplateTask(num_components=3, body_length=2, max_uses=0).problem(rng(0))
  problem = type(problem)(letters=('ab', 'bc', 'aa'), uses=((), (0,), (0, 1)))
  assert list(problem.solution().values()) == ['Aab', 'Bcd', 'Cee']
  assert problem.prompt == 'build A:ab< B:bc<A C:aa<AB\n'


def test_the_last_writing_counts():
  problem = TreeSum((1, 2, 3, 4))
  assert problem.solution() == {0: 'a10', 1: 'b03', 2: 'c07'}
  assert union_coverage(problem, ['b03c07a10']) == 1.0
  assert union_coverage(problem, ['b03c07a10a11']) == pytest.approx(2 / 3)
  assert union_coverage(problem, ['b04b03', 'c07']) == pytest.approx(2 / 3)
  # Character by character: the second thinker's writing ends later.
  assert union_coverage(problem, ['b03', '~b09']) == 0.0
  assert union_coverage(problem, ['b03', '~b09'], length=3) == pytest.approx(1 / 3)


def test_units_waits_and_what_was_given_up():
  problem = Enumeration(('abc', 'bcd', 'xyz'))
  text = f'{WAIT}abcx{ABORT}bcd{WAIT}{WAIT}xy'
  assert [(item.unit, item.end) for item in units_in(problem, text)] == [(0, 4), (1, 9)]
  assert claimed_in(problem, text) == {0, 1, 2}  # The last has been begun.
  tree = TreeSum((1, 2, 3, 4))
  assert claimed_in(tree, f'b0{ABORT}c0') == {2}
  assert units_in(tree, f'b0{ABORT}c07')[0].text == 'c07'


@settings(max_examples=200, deadline=None)
@given(
  name=st.sampled_from(list(TASKS)),
  texts=st.lists(st.text(st.characters(max_codepoint=127), max_size=60), min_size=1, max_size=4),
  seed=st.integers(0, 5),
)
def test_any_text_has_a_score(name, texts, seed):
  """What models write before they have learnt anything."""
  problem = TASKS[name].problem(rng(seed))
  assert 0 <= union_coverage(problem, texts) <= 1
  assert 0 <= duplicate_share(problem, texts) < 1


@pytest.mark.parametrize('name', ['enumeration', 'tree_sum', 'template'])
def test_coverage_of_right_texts_never_falls(name):
  problem = TASKS[name].problem(rng(1))
  texts = simulate(problem, 3, rng(1))
  curve = [union_coverage(problem, texts, length) for length in range(max(map(len, texts)) + 1)]
  assert curve == sorted(curve) and curve[-1] == 1.0


# What teachers see.


def test_what_is_seen():
  rows = {
    Seen(): [(0, 1, 5), (1, 1, 5), (2, 1, 5)],
    Seen(lag=1): [(0, 1, 4), (1, 1, 5), (2, 1, 4)],
    Seen(lag=9): [(0, 1, 0), (1, 1, 5)],
    Seen(by_rank=True): [(0, 1, 5), (1, 1, 5), (2, 1, 4)],
  }
  for seen, expected in rows.items():
    for other, thinker, length in expected:
      assert seen.of(other, thinker=thinker, step=5) == length, (seen, other)


def test_independent_teachers_follow_their_theory():
  """Distinct items of each, independent of the others: 1 - (1 - K/L)^N of L are covered."""
  items, thinkers = 16, 4
  task = EnumerationTask(num_items=items)
  for length in (2, 4, 8):
    scores = [
      union_coverage(
        task.problem(rng(seed)),
        simulate(task.problem(rng(seed)), thinkers, rng(seed), seen=ALONE),
        length,
      )
      for seed in range(300)
    ]
    error = np.std(scores) / np.sqrt(len(scores))
    assert abs(np.mean(scores) - (1 - (1 - length / items) ** thinkers)) < 4 * error


def test_seeing_teachers_lose_only_what_they_choose_at_the_same_step():
  """At random among what is left, with collisions within a step: simulated here without texts."""
  items, thinkers, length = 16, 4, 4
  task, generator = EnumerationTask(num_items=items), rng(0)

  def ideal() -> float:
    left = set(range(items))
    for _ in range(length):
      left -= {int(generator.choice(sorted(left))) for _ in range(thinkers) if left}
    return 1 - len(left) / items

  scores = [
    union_coverage(
      task.problem(rng(seed)), simulate(task.problem(rng(seed)), thinkers, rng(seed)), length
    )
    for seed in range(300)
  ]
  expected = [ideal() for _ in range(3000)]
  error = np.std(scores) / np.sqrt(len(scores))
  assert abs(np.mean(scores) - np.mean(expected)) < 4 * error
  assert np.mean(expected) == pytest.approx(0.844, abs=0.01)  # As published for this size.


def test_an_unseen_text_changes_nothing():
  """Two runs that differ in a text nobody sees yet go on alike."""
  problem = EnumerationTask(num_items=12).problem(rng(0))
  lag = 6
  texts = simulate(problem, 2, rng(5), seen=Seen(lag=lag))
  alone = simulate(problem, 2, rng(5), seen=ALONE)
  # For as long as nothing was seen, seeing makes no difference.
  assert [text[: lag + 1] for text in texts] == [text[: lag + 1] for text in alone]
  assert texts != alone


def test_collisions_are_given_up():
  problem = EnumerationTask(num_items=4, item_length=6).problem(rng(0))
  teacher = Teacher(slip=0.5, abort=0.7, max_length=400)
  texts = list(
    itertools.chain.from_iterable(
      simulate(problem, 4, rng(seed), teacher=teacher) for seed in range(10)
    )
  )
  assert any(ABORT in text for text in texts)


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: EnumerationTask(num_items=0), 'num_items=0'),
    (lambda: EnumerationTask(num_items=200), 'num_items=200 of item_length=1'),
    (lambda: EnumerationTask(item_length=0), 'item_length=0'),
    (lambda: FloydWarshallTask(num_nodes=9), 'num_nodes=9 is outside 2 to 8'),
    (lambda: FloydWarshallTask(edge_share=0), r'edge_share=0 is outside \(0, 1\]'),
    (lambda: FloydWarshallTask(num_nodes=8, max_weight=6), 'max_weight=6: paths of up to 42'),
    (lambda: TreeSumTask(depth=6), 'depth=6 is outside 1 to 5'),
    (lambda: TemplateTask(num_components=27), 'num_components=27'),
    (lambda: TemplateTask(body_length=0), 'body_length=0'),
  ],
)
def test_bad_sizes_are_named(make, words):
  with pytest.raises(UserError, match=words):
    make()
