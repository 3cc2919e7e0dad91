# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a Hugging Face folder to early exits
#
# A model that knows nothing of exits is read from its safetensors, gets exits while it stays frozen (EE-Tuning, arXiv 2402.00518), and is
# measured: what each exit costs in quality, and what it buys in time. A minute on two cores.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from exitax.checkpoint import load_model
from exitax.convert import from_huggingface, open_source, to_huggingface
from exitax.data import (
  BpeVocabulary,
  DataConfig,
  PythonLibrarySource,
  SavedVocabulary,
  Task,
  build_data,
)
from exitax.evaluate import EvaluateConfig, evaluate
from exitax.evaluate.picture import draw_report, to_png
from exitax.models import ExitConfig, ModelConfig
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from exitax.training import LoopConfig, OptimizerConfig, RunConfig, read_metrics, train

work = Path(tempfile.mkdtemp())
mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingRules()

# %% [markdown]
# ## A Hugging Face folder
#
# Set `huggingface_folder` to a Llama, Mistral, Qwen 2 or Qwen 3 that you have downloaded. Without one, a small model without exits is trained here on
# Python's own library and written as such a folder: `config.json`, `model.safetensors`, `tokenizer.json`.

# %%
huggingface_folder = None
text = Task('some_modules', PythonLibrarySource(max_files=60))

if huggingface_folder is None:
  run = RunConfig(
    model=ModelConfig(
      vocab_size=512,
      num_layers=4,
      embed_dim=64,
      num_heads=4,
      num_kv_heads=2,
      mlp_dim=176,
      max_length=256,
    ),
    data=DataConfig(mixture=text, vocabulary=BpeVocabulary(512), length=64, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=20),
    loop=LoopConfig(train_steps=150, log_period=50, checkpoint_period=150, eval_rows=32),
  )
  train(run, work / 'trained')
  huggingface_folder = work / 'huggingface'
  to_huggingface(load_model(work / 'trained', mesh=mesh, rules=rules), huggingface_folder)
print(*sorted(path.name for path in Path(huggingface_folder).iterdir()), sep='\n')

# %% [markdown]
# ## Into a model directory
#
# On the command line: `exitax convert from-hf FOLDER runs/backbone`. Weights go block by block from mapped memory into the checkpoint: no more than a few blocks are in memory.

# %%
source = open_source(huggingface_folder, max_length=256)
from_huggingface(source, work / 'backbone')
backbone = load_model(work / 'backbone', mesh=mesh, rules=rules)
print(
  f'{source.config.num_layers} layers of width {source.config.embed_dim}, no exits, {source.num_bytes / 1e6:.1f} MB'
)

# %% [markdown]
# ## Exits, tuned on the frozen model
#
# `exitax tune-exits --gin_file=gin/runs/ee_tune.gin --backbone=runs/backbone`. As many exits as you like in one pass: they do not know of each other. Nothing
# behind the last one is run, and no gradient enters the backbone. Heads that start as copies of the final head start lower than random ones.

# %%
layers = tuple(range(1, source.config.num_layers))
exits = tuple(ExitConfig(layer=layer, head='mlp') for layer in layers)


def tuned(start):
  """Tunes the exits from copied or random heads."""
  directory = work / f'tuned-{start}'
  run = RunConfig(
    model=dataclasses.replace(source.config, exits=exits),
    data=DataConfig(
      mixture=text,
      vocabulary=SavedVocabulary(str(work / 'backbone' / 'tokenizer')),
      length=64,
      batch_size=16,
    ),
    trained='exits',
    optimizer=OptimizerConfig(
      learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=5, weight_decay=0.0
    ),
    loop=LoopConfig(
      train_steps=60,
      log_period=5,
      checkpoint_period=60,
      eval_rows=32,
      initial_checkpoint=str(work / 'backbone'),
      initial_exits=start,
    ),
  )
  train(run, directory)
  return directory


directories = {start: tuned(start) for start in ('copy', 'random')}

# %%
figure, axes = plt.subplots(1, len(layers), figsize=(13, 3), sharey=True, layout='constrained')
for axis, layer in zip(axes, layers, strict=True):
  for start, directory in directories.items():
    points = [
      (m['step'], m[f'train/exit_{layer}/nll'])
      for m in read_metrics(directory)
      if f'train/exit_{layer}/nll' in m
    ]
    axis.plot(*zip(*points, strict=True), label=start)
  axis.set(title=f'exit after layer {layer}', xlabel='step')
axes[0].set_ylabel('loss, nats per token')
legend = axes[0].legend(title='heads start as')

# %% [markdown]
# The backbone has not changed by a bit:

# %%
model = load_model(directories['copy'], mesh=mesh, rules=rules)
for name in ('embed', 'blocks', 'norm'):
  pairs = zip(
    jax.tree.leaves(backbone.params[name]), jax.tree.leaves(model.params[name]), strict=True
  )
  assert all(np.array_equal(a, b) for a, b in pairs), name
print('the same, and so is every text at full depth')

# %% [markdown]
# ## What it buys
#
# `exitax evaluate --model_dir=runs/tuned`: every exit, every threshold, and seconds beside full decoding. A frozen model was never asked to be right
# early: training it on with LayerSkip or self-distillation (`gin/runs/layerskip.gin`, `gin/runs/self_distill.gin`) makes its first layers agree with the last
# more often, at the price of touching it.

# %%
data = build_data(DataConfig(mixture=text, length=64, batch_size=16), tokenizer=model.tokenizer)
report = evaluate(
  model, data, EvaluateConfig(rows=32, speed_prompts=2, speed_new_tokens=24, speed_repeats=1)
)
Image(to_png(draw_report(report)))
