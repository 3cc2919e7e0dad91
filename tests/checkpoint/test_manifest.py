"""Damage of every kind is found, and the message names the file, the step and the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from exitax import checkpoint
from exitax.checkpoint import digest, manifest
from exitax.checkpoint.tree import LeafSpec

NUM_FLIPS = 60


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A directory with the steps 10 and 20."""
  directory = tmp_path_factory.mktemp('saved')
  rng = np.random.default_rng(0)
  with checkpoint.CheckpointManager(directory) as manager:
    for step in (10, 20):
      state = {
        'params': {'kernel': rng.normal(size=(64, 64)).astype(np.float32)},
        'opt_state': {'mu': rng.normal(size=(64, 64)).astype(np.float32)},
        'step': np.int32(step),
      }
      manager.save(step, state, extras={'position': step}, metrics={'loss': 1 / step})
  return directory


def _abstract() -> dict[str, object]:
  matrix = jax.ShapeDtypeStruct((64, 64), np.float32)
  return {
    'params': {'kernel': matrix},
    'opt_state': {'mu': matrix},
    'step': jax.ShapeDtypeStruct((), np.int32),
  }


def _flip_bit(path: Path, *, bit: int) -> None:
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(content)


def _files(folder: Path) -> list[Path]:
  return [folder / name for name in digest.list_files(folder) if (folder / name).stat().st_size]


def test_every_bit_flip_is_found(saved: Path, tmp_path: Path) -> None:
  rng = np.random.default_rng(1)
  directory = tmp_path / 'copy'
  shutil.copytree(saved, directory)
  manager = checkpoint.CheckpointManager(directory)
  paths = _files(directory / '20')
  # Every file once, then files by their share of the bytes, as a failing disk would choose them.
  sizes = np.array([path.stat().st_size for path in paths], float)
  chosen = rng.choice(len(paths), size=NUM_FLIPS, p=sizes / sizes.sum())
  for path in [*paths, *(paths[index] for index in chosen)]:
    intact = path.read_bytes()
    _flip_bit(path, bit=int(rng.integers(8 * len(intact))))
    with pytest.raises(checkpoint.CheckpointError, match=r'step 20 .*is damaged') as caught:
      manager.restore(_abstract())
    assert path.relative_to(directory / '20').as_posix() in str(caught.value)
    path.write_bytes(intact)
  restored = manager.restore(_abstract())
  assert int(restored.state['step']) == 20


def test_every_truncation_is_found(saved: Path, tmp_path: Path) -> None:
  rng = np.random.default_rng(2)
  directory = tmp_path / 'copy'
  shutil.copytree(saved, directory)
  manager = checkpoint.CheckpointManager(directory)
  for path in _files(directory / '20'):
    intact = path.read_bytes()
    for size in {0, len(intact) - 1, int(rng.integers(len(intact)))}:
      path.write_bytes(intact[:size])
      with pytest.raises(checkpoint.CheckpointError, match=path.name):
        manager.restore(_abstract())
    path.write_bytes(intact)
  manager.verify(20)


def test_a_missing_file_is_found(saved: Path, tmp_path: Path) -> None:
  directory = tmp_path / 'copy'
  shutil.copytree(saved, directory)
  manager = checkpoint.CheckpointManager(directory)
  for name in set(digest.list_files(directory / '20')) - {manifest.MANIFEST_NAME}:
    path = (directory / '20' / name).rename(tmp_path / 'elsewhere')
    with pytest.raises(checkpoint.CheckpointError, match=f'{name} is missing'):
      manager.restore(_abstract())
    path.rename(directory / '20' / name)
  manager.verify()


def test_the_message_leads_to_the_newest_intact_step(saved: Path, tmp_path: Path) -> None:
  directory = tmp_path / 'copy'
  shutil.copytree(saved, directory)
  shutil.copytree(directory / '20', directory / '30')
  manager = checkpoint.CheckpointManager(directory)
  with pytest.raises(checkpoint.CheckpointError, match='belongs to step 20') as caught:
    manager.info()
  fix = f'to resume from step 20, delete {directory / "30"} and run again'
  assert fix in str(caught.value)
  shutil.rmtree(directory / '30')
  assert int(manager.restore(_abstract()).state['step']) == 20
  for step in ('10', '20'):
    (directory / step / 'extras-0.json').write_text('{}')
  with pytest.raises(checkpoint.CheckpointError, match='no older checkpoint is intact'):
    manager.restore(_abstract())


def test_a_stranger_in_the_folder_is_mentioned_only(
  saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  directory = tmp_path / 'copy'
  shutil.copytree(saved, directory)
  (directory / '20' / 'notes.txt').write_text('my best run')
  assert checkpoint.CheckpointManager(directory).restore(_abstract()).step == 20
  assert 'notes.txt is not part of checkpoint' in caplog.text


def test_a_step_with_a_damaged_manifest_has_no_metrics_but_is_kept(saved: Path, tmp_path: Path):
  directory = tmp_path / 'copy'
  shutil.copytree(saved, directory)
  config = checkpoint.CheckpointConfig(keep_latest=2)
  with checkpoint.CheckpointManager(directory, config=config) as manager:
    assert manager.best_step() == 20
    _flip_bit(directory / '20' / manifest.MANIFEST_NAME, bit=99)
    assert manager.best_step() == 10
    manager.save(30, {'w': np.zeros(2)})
  # 10 is the best of those known, 20 and 30 are the latest.
  assert manager.steps() == [10, 20, 30]


def _example() -> manifest.Manifest:
  return manifest.Manifest(
    step=3,
    num_processes=2,
    metrics={'loss': 0.5},
    leaves={'params/w': LeafSpec(shape=(2, 3), dtype='bfloat16')},
    files={'a/b': digest.FileRecord(size=3, sha256='00ff')},
  )


def test_encode_and_decode_are_inverse() -> None:
  raw = manifest.encode(_example())
  assert manifest.decode(raw) == _example()
  assert json.loads(raw)['format'] == manifest.FORMAT_VERSION


def test_a_manifest_protects_every_one_of_its_bits() -> None:
  raw = manifest.encode(_example())
  for bit in range(8 * len(raw)):
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(manifest.DamagedManifest):
      manifest.decode(bytes(flipped))


def test_a_newer_format_asks_for_a_newer_exitax(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(manifest, 'FORMAT_VERSION', 2)
  raw = manifest.encode(_example())
  monkeypatch.setattr(manifest, 'FORMAT_VERSION', 1)
  with pytest.raises(checkpoint.CheckpointError, match='format 2, this exitax reads up to 1'):
    manifest.decode(raw)
