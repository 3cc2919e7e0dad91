from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from exitax import checkpoint, data, layers, models, parallel, training
from exitax.errors import UserError
from exitax.layers import Precision


class _Crash(Exception):
  pass


class _CrashingDisplay(training.QuietDisplay):
  """Ends the run as an error in the middle would."""

  def __init__(self, at: int) -> None:
    self._at = at

  def advance(self, step: int) -> None:
    if step == self._at:
      raise _Crash


class _Recorder(training.QuietDisplay):
  """Keeps what was shown."""

  def __init__(self) -> None:
    self.messages: list[str] = []
    self.steps: list[int] = []

  def message(self, text: str) -> None:
    self.messages.append(text)

  def advance(self, step: int) -> None:
    self.steps.append(step)


def _same(left, right) -> None:
  jax.tree.map(np.testing.assert_array_equal, left, right)


def _timeless(lines):
  """Metrics without those that tell the time."""
  speed = {'step_seconds', 'tokens_per_second', 'mfu'}
  return [{k: v for k, v in line.items() if k not in speed} for line in lines]


@pytest.fixture(scope='module')
def straight(tiny, root, tmp_path_factory):
  """An uninterrupted run of 8 steps: its result and its model directory."""
  model_dir = tmp_path_factory.mktemp('straight')
  return training.train(tiny.make_config(root), model_dir), model_dir


def _steps(model_dir) -> list[int]:
  return checkpoint.CheckpointManager(checkpoint.checkpoints_directory(model_dir)).steps()


def test_a_run_leaves_metrics_checkpoints_and_model(tiny, straight):
  result, model_dir = straight
  assert (result.step, result.finished) == (8, True)
  assert _steps(model_dir) == [6, 8]
  lines = training.read_metrics(model_dir)
  training_lines = [line for line in lines if 'train/loss' in line]
  # Every second step, and at the checkpoints of steps 3 and 6.
  assert [line['step'] for line in training_lines] == [2, 3, 4, 6, 8]
  assert [line['exit_weight/exit_1'] for line in training_lines] == pytest.approx(
    [0.5 - 0.4 * min(step - 1, 6) / 6 for step in (2, 3, 4, 6, 8)], abs=1e-6
  )
  # The first step only compiles: speed is known from the second on.
  assert all(line['tokens_per_second'] > 0 for line in training_lines)
  held_out = [line for line in lines if 'held_out/final/nll' in line]
  assert [line['step'] for line in held_out] == [8]
  assert held_out[0]['held_out/final/nll'] == result.scores[-1].nll
  config, tokenizer = checkpoint.read_model(model_dir)
  assert config == tiny.MODEL
  assert tokenizer.vocab_size == 264
  assert list((model_dir / 'tensorboard').iterdir())
  loaded = checkpoint.load_model(
    model_dir, mesh=parallel.make_mesh(parallel.MeshConfig()), rules=parallel.ShardingRules()
  )
  assert loaded.step == 8
  _same(loaded.params, result.params)


def test_an_interrupted_run_ends_bitwise_where_a_straight_one_does(tiny, root, straight, tmp_path):
  wanted, straight_dir = straight
  config = tiny.make_config(root)
  with pytest.raises(_Crash):
    training.train(config, tmp_path, display=_CrashingDisplay(5))
  assert _steps(tmp_path) == [3]
  display = _Recorder()
  result = training.train(config, tmp_path, display=display)
  assert display.messages[0] == f'resuming from step 3 in {tmp_path}'
  assert display.steps == [4, 5, 6, 7, 8]
  _same(result.params, wanted.params)
  assert result.scores == wanted.scores
  assert _timeless(training.read_metrics(tmp_path)) == _timeless(
    training.read_metrics(straight_dir)
  )


def test_running_a_finished_run_again_trains_nothing(tiny, root, straight):
  wanted, model_dir = straight
  before = (model_dir / 'metrics.jsonl').read_bytes()
  saved = {path: path.stat().st_mtime_ns for path in (model_dir / 'checkpoints').rglob('*')}
  display = _Recorder()
  result = training.train(tiny.make_config(root), model_dir, display=display)
  assert display.steps == []
  assert result.scores == wanted.scores
  _same(result.params, wanted.params)
  assert (model_dir / 'metrics.jsonl').read_bytes() == before
  assert {p: p.stat().st_mtime_ns for p in (model_dir / 'checkpoints').rglob('*')} == saved


def test_loss_falls_and_deeper_exits_know_more(tiny, root, tmp_path):
  config = tiny.make_config(
    root, train_steps=120, log_period=20, checkpoint_period=120, eval_period=60
  )
  result = training.train(config, tmp_path)
  shallow, final = result.scores
  assert final.nll < 0.45 * math.log(264)
  assert final.nll < shallow.nll
  lines = training.read_metrics(tmp_path)
  for name in ('exit_1', 'final'):
    losses = [line[f'train/{name}/nll'] for line in lines if 'train/loss' in line]
    assert losses[-1] < 0.6 * losses[0]
  assert [line['step'] for line in lines if 'held_out/final/nll' in line] == [60, 120]
  assert final.bits_per_byte == pytest.approx(final.nll / math.log(2), rel=0.02)


@pytest.mark.parametrize('checkpoint_period', [1, 100])
def test_divergence_leaves_no_checkpoint_behind(tiny, root, tmp_path, checkpoint_period):
  """The very first update spoils the parameters, while the first step's own loss is still fine."""
  config = tiny.make_config(root, train_steps=20, checkpoint_period=checkpoint_period)
  optimizer = training.OptimizerConfig(learning_rate=1e20, warmup_steps=0)
  config = dataclasses.replace(config, optimizer=optimizer)
  with pytest.raises(training.DivergenceError) as caught:
    training.train(config, tmp_path)
  # Without a save in between, the next step's gradient shows it.
  step = 1 if checkpoint_period == 1 else 2
  assert f'training diverged at step {step}: ' in str(caught.value)
  assert 'no checkpoint was written yet' in str(caught.value)
  assert 'lower learning_rate' in str(caught.value)
  assert _steps(tmp_path) == []


def test_divergence_names_the_last_good_checkpoint_which_still_resumes(
  tiny, root, straight, tmp_path
):
  with pytest.raises(_Crash):
    training.train(tiny.make_config(root), tmp_path, display=_CrashingDisplay(5))
  config = tiny.make_config(root)
  absurd = dataclasses.replace(config.optimizer, learning_rate=1e20)
  with pytest.raises(
    training.DivergenceError, match=r'last good checkpoint: step 3 in .*/checkpoints'
  ):
    training.train(dataclasses.replace(config, optimizer=absurd), tmp_path)
  assert _steps(tmp_path) == [3]
  _same(training.train(config, tmp_path).params, straight[0].params)


def _changed(config, part, **values):
  return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


@pytest.mark.parametrize(
  ('part', 'values', 'message'),
  [
    ('model', {'mlp_dim': 64}, 'holds a model with mlp_dim=32, the configuration says 64'),
    ('model', {'exits': (models.ExitConfig(layer=1, head='mlp'),)}, 'holds a model with exits='),
    (
      'model',
      {'rope': layers.RopeConfig(theta=5.0)},
      'rope=',
    ),
    ('data', {'length': 16}, 'the saved data state .* belongs to other data'),
    ('data', {'seed': 3}, 'the saved data state .* belongs to other data'),
    ('data', {'vocabulary': data.BpeVocabulary(260)}, 'was made with another tokenizer'),
  ],
  ids=['width', 'exits', 'rope', 'length', 'data seed', 'tokenizer'],
)
def test_resuming_another_run_is_refused_and_harms_nothing(
  tiny, root, straight, part, values, message
):
  _, model_dir = straight
  before = {path: path.read_bytes() for path in sorted(model_dir.rglob('*')) if path.is_file()}
  with pytest.raises(UserError, match=message):
    training.train(_changed(tiny.make_config(root), part, **values), model_dir)
  after = {path: path.read_bytes() for path in sorted(model_dir.rglob('*')) if path.is_file()}
  assert after == before


def test_tokenizer_must_fit_the_vocabulary(tiny, root, tmp_path):
  config = _changed(tiny.make_config(root), 'model', vocab_size=200)
  with pytest.raises(UserError, match=r'^the tokenizer has 264 ids, vocab_size=200 has no room'):
    training.train(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_mesh_that_does_not_divide_is_named_before_anything_is_written(tiny, root, tmp_path):
  config = tiny.make_config(root)
  mesh = parallel.MeshConfig(data=2, tensor=4)
  with pytest.raises(UserError, match=r'tensor=4 does not divide num_heads=2'):
    training.train(dataclasses.replace(config, mesh=mesh), tmp_path)
  assert not list(tmp_path.iterdir())


def test_initial_checkpoint_gives_the_parameters_alone(tiny, root, straight, tmp_path):
  wanted, source = straight
  config = tiny.make_config(root, train_steps=1, initial_checkpoint=str(source))
  # Steps so small that they round away.
  optimizer = training.OptimizerConfig(learning_rate=1e-30, warmup_steps=0)
  result = training.train(dataclasses.replace(config, optimizer=optimizer), tmp_path)
  assert result.step == 1
  _same(result.params, wanted.params)


def test_initial_checkpoint_must_fit(tiny, root, straight, tmp_path):
  _, source = straight
  config = tiny.make_config(root, train_steps=1, initial_checkpoint=str(source))
  with pytest.raises(UserError, match='holds a model of another shape'):
    training.train(_changed(config, 'model', mlp_dim=64), tmp_path / 'wider')
  other_words = _changed(config, 'data', vocabulary=data.BpeVocabulary(260))
  with pytest.raises(UserError, match='does not match checkpoint'):
    training.train(other_words, tmp_path / 'words')
  missing = _changed(config, 'loop', initial_checkpoint=str(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match=r'nowhere/model\.json does not exist'):
    training.train(missing, tmp_path / 'missing')


def test_bfloat16_with_accumulation_under_the_profiler(tiny, root, tmp_path):
  config = tiny.make_config(
    root, train_steps=4, accumulation_steps=2, log_period=1, profile_start=1, profile_steps=1
  )
  config = _changed(config, 'model', precision=Precision.BFLOAT16)
  # Parts of 4 rows do not spread over more devices.
  config = dataclasses.replace(config, mesh=parallel.MeshConfig(data=4, tensor=2))
  display = _Recorder()
  result = training.train(config, tmp_path, display=display)
  assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype('float32')}
  lines = [line for line in training.read_metrics(tmp_path) if 'train/loss' in line]
  assert [line['step'] for line in lines] == [1, 2, 3, 4]
  assert lines[-1]['train/loss'] < lines[0]['train/loss']
  # The first step only compiles; every later one has a speed of its own.
  assert ['tokens_per_second' in line for line in lines] == [False, True, True, True]
  assert f'profile written to {tmp_path / "profile"}' in display.messages
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_best_and_latest_checkpoints_are_kept(tiny, root, tmp_path):
  config = tiny.make_config(root, train_steps=6, checkpoint_period=1, eval_period=1)
  # A rate that rises to nonsense: the best step is an early one.
  optimizer = training.OptimizerConfig(
    learning_rate=1e-3, final_learning_rate=3.0, warmup_steps=0, decay='linear'
  )
  config = dataclasses.replace(
    config,
    optimizer=optimizer,
    loop=dataclasses.replace(config.loop, max_loss_ratio=1e6),
  )
  training.train(config, tmp_path)
  losses = {
    line['step']: line['held_out/final/nll']
    for line in training.read_metrics(tmp_path)
    if 'held_out/final/nll' in line
  }
  best = min(losses, key=losses.get)
  assert best < 5
  assert _steps(tmp_path) == [best, 5, 6]


def test_the_mesh_does_not_change_the_run(tiny, root, straight, tmp_path):
  wanted, _ = straight
  config = tiny.make_config(root, train_steps=8)
  mesh = parallel.MeshConfig(data=4, tensor=2)
  result = training.train(dataclasses.replace(config, mesh=mesh), tmp_path)
  for got, want in zip(result.scores, wanted.scores, strict=True):
    assert got.nll == pytest.approx(want.nll, abs=1e-4)
  pairs = itertools.zip_longest(jax.tree.leaves(result.params), jax.tree.leaves(wanted.params))
  for got, want in pairs:
    np.testing.assert_allclose(got, want, atol=5e-4)


@pytest.mark.slow
def test_a_pipeline_does_not_change_the_run_and_resumes_bitwise(tiny, root, straight, tmp_path):
  wanted, _ = straight
  config = dataclasses.replace(
    tiny.make_config(root),
    mesh=parallel.MeshConfig(data=2, pipeline=2, tensor=2),
    pipeline=training.PipelineConfig(num_microbatches=2, recompute='none'),
  )
  whole = training.train(config, tmp_path / 'whole')
  with pytest.raises(_Crash):
    training.train(config, tmp_path / 'crashed', display=_CrashingDisplay(5))
  resumed = training.train(config, tmp_path / 'crashed')
  _same(resumed.params, whole.params)
  for ours, theirs in zip(whole.scores, wanted.scores, strict=True):
    assert ours.nll == pytest.approx(theirs.nll, rel=1e-4)
  # What was trained on stages opens on one device.
  loaded = checkpoint.load_model(
    tmp_path / 'whole',
    mesh=parallel.make_mesh(parallel.MeshConfig(data=1), jax.devices()[:1]),
    rules=parallel.ShardingRules(),
  )
  _same(jax.device_get(loaded.params), jax.device_get(whole.params))


def test_microbatches_that_do_not_divide_are_named_before_anything_is_written(tiny, root, tmp_path):
  config = dataclasses.replace(
    tiny.make_config(root),
    mesh=parallel.MeshConfig(data=4, pipeline=2),
    pipeline=training.PipelineConfig(num_microbatches=4),
  )
  with pytest.raises(UserError, match='num_microbatches=4 x data=4 does not divide the 8 rows'):
    training.train(config, tmp_path / 'model')
  assert not (tmp_path / 'model').exists()
