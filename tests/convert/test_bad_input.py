"""Folders that cannot be converted: one line that names what is wrong, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exitax.convert import open_source
from exitax.errors import UserError
from tests.commands.conftest import RunCommand, exitax  # noqa: F401
from tests.convert.conftest import WHY, MakeFn, write_tokenizer

torch_files = pytest.importorskip('safetensors.torch', reason=WHY)
torch = pytest.importorskip('torch', reason=WHY)


def edit_config(folder: Path, **changes: Any) -> None:
  path = folder / 'config.json'
  content = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({key: value for key, value in content.items() if value != '-'}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
  path = folder / 'model.safetensors'
  tensors = torch_files.load_file(path)
  change(tensors)
  torch_files.save_file(
    {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {'format': 'pt'}
  )


def cut_off(folder: Path) -> None:
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-10])


def only_pickle(folder: Path) -> None:
  (folder / 'model.safetensors').unlink()
  (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04.')


def lose_a_shard(folder: Path) -> None:
  index = {'weight_map': {'a': 'model-00001-of-00002.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


UP = 'model.layers.1.mlp.up_proj.weight'
CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
  'architecture': (
    'llama',
    lambda f: edit_config(f, architectures=['GPT2LMHeadModel'], model_type='gpt2'),
    'architecture GPT2LMHeadModel is not known: exitax reads LlamaForCausalLM, Mistral',
  ),
  'missing tensor': (
    'llama',
    lambda f: edit_tensors(f, lambda t: t.__delitem__(UP)),
    f'the checkpoint lacks {UP}: fetch it again',
  ),
  'extra tensor': (
    'llama',
    lambda f: edit_tensors(f, lambda t: t.update({'model.layers.9.x': torch.zeros(1)})),
    'the checkpoint has model.layers.9.x, for which',
  ),
  'biases that config.json does not speak of': (
    'llama_biases',
    lambda f: edit_config(f, attention_bias=False),
    'q_proj.bias, model.layers',
  ),
  'shape': (
    'llama',
    lambda f: edit_tensors(f, lambda t: t.update({UP: torch.zeros(3, 4)})),
    f'{UP} is [3, 4] in the checkpoint, [48, 32] by config.json',
  ),
  'dtype': (
    'llama',
    lambda f: edit_tensors(f, lambda t: t.update({UP: torch.zeros(48, 32, dtype=torch.int8)})),
    f'{UP} is of dtype I8: F64, F32, F16, BF16 are read',
  ),
  'head that is not tied': (
    'llama_biases',
    lambda f: edit_tensors(f, lambda t: t.update({'lm_head.weight': torch.zeros(96, 32)})),
    'set tie_word_embeddings to false',
  ),
  'cut off': ('llama', cut_off, 'is cut off: its header promises'),
  'pickle': ('llama', only_pickle, 'has pytorch_model.bin only, a pickle'),
  'lost shard': ('llama', lose_a_shard, 'lacks model-00001-of-00002.safetensors'),
  'no weights': (
    'llama',
    lambda f: (f / 'model.safetensors').unlink(),
    'has no model.safetensors',
  ),
  'no config': ('llama', lambda f: (f / 'config.json').unlink(), 'no config.json in'),
  'config that is no JSON': (
    'llama',
    lambda f: (f / 'config.json').write_text('{'),
    'config.json is not JSON',
  ),
  'number that is none': (
    'llama',
    lambda f: edit_config(f, hidden_size='32'),
    "config.json has hidden_size='32': a whole number is needed",
  ),
  'activation': ('llama', lambda f: edit_config(f, hidden_act='gelu'), "hidden_act='gelu'"),
  'biases of the MLP': ('llama', lambda f: edit_config(f, mlp_bias=True), 'mlp_bias=true'),
  'quantised': (
    'llama',
    lambda f: edit_config(f, quantization_config={'quant_method': 'gptq'}),
    'the weights are quantised (gptq)',
  ),
  'rotary': (
    'llama',
    lambda f: edit_config(f, rope_parameters={'rope_type': 'longrope', 'rope_theta': 1e4}),
    "rope_type='longrope' is not known: choose default, linear, llama3 or yarn",
  ),
  'rotary without its factor': (
    'llama',
    lambda f: edit_config(f, rope_parameters={'rope_type': 'linear', 'rope_theta': 1e4}),
    "rope_type='linear' needs 'factor'",
  ),
  'windows of some layers': (
    'qwen2_window',
    lambda f: edit_config(
      f, layer_types=['full_attention', 'sliding_attention', 'sliding_attention']
    ),
    '2 of 3 layers have a sliding window',
  ),
  'no tokenizer': (
    'llama',
    lambda f: (f / 'tokenizer.json').unlink(),
    'give one with --tokenizer',
  ),
  'tokenizer too large': (
    'llama',
    lambda f: write_tokenizer(f, vocab_size=97),
    'has 97 ids and the model 96',
  ),
  'tokenizer too small': (
    'llama',
    lambda f: write_tokenizer(f, vocab_size=60),
    'has 60 ids and the model 96',
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_one_line_says_what_is_wrong(
  name: str,
  make_folder: MakeFn,
  tmp_path: Path,
  exitax: RunCommand,  # noqa: F811
) -> None:
  variant, spoil, message = CASES[name]
  folder = make_folder(variant)
  spoil(folder)
  found = exitax('convert', 'from-hf', folder, tmp_path / 'out')
  assert found.status == 2
  assert message in found.err
  assert len(found.err.strip().splitlines()) == 1
  assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_what_is_there_is_not_overwritten(
  make_folder: MakeFn,
  tmp_path: Path,
  exitax: RunCommand,  # noqa: F811
) -> None:
  folder, out = make_folder('llama'), tmp_path / 'out'
  assert exitax('convert', 'from-hf', folder, out).status == 0
  found = exitax('convert', 'from-hf', folder, out)
  assert (found.status, 'is not an empty folder' in found.err) == (2, True)
  found = exitax('convert', 'to-hf', out, folder)
  assert (found.status, 'is not an empty folder' in found.err) == (2, True)
  found = exitax('convert', 'to-hf', tmp_path / 'nothing', tmp_path / 'back')
  assert (found.status, 'model.json does not exist' in found.err) == (2, True)


def test_a_longer_context_is_refused(make_folder: MakeFn) -> None:
  with pytest.raises(UserError, match='max_length=129 exceeds the 128 positions'):
    open_source(make_folder('llama'), max_length=129)
  assert open_source(make_folder('mistral'), max_length=64).config.max_length == 64


def test_a_killed_conversion_leaves_nothing_that_looks_finished(
  make_folder: MakeFn, tmp_path: Path
) -> None:
  """Killed as soon as its folder shows itself, which is long before it is renamed."""
  folder, out = make_folder('llama', num_hidden_layers=8), tmp_path / 'out'
  command = [sys.executable, '-m', 'exitax', 'convert', 'from-hf', str(folder), str(out)]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while not list(tmp_path.glob('.out.*.partial')) and time.monotonic() < deadline:
    assert process.poll() is None, 'the conversion ended before it was seen'
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert not out.exists()
  again = subprocess.run(command, check=False, capture_output=True)
  assert again.returncode == 0, again.stderr
  assert (out / 'model.json').is_file()
