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
# # A language model that can stop early
#
# In about a minute on two cores: train a small transformer with two early exits on real text, see what each exit has
# learnt, trade quality for speed with a confidence threshold, and read text whose tokens are coloured by depth.
#
# Everything below is plain Python; `exitax train --gin_file=gin/runs/quickstart.gin` does the same from files.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import HTML, Image

import exitax
from exitax.checkpoint import load_model
from exitax.data import BpeVocabulary, DataConfig, PythonLibrarySource, Task, build_data
from exitax.evaluate import EvaluateConfig, evaluate, write_report
from exitax.models import ExitConfig, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig
from exitax.parallel import ShardingRules, make_mesh, use
from exitax.training import LoopConfig, OptimizerConfig, RunConfig, read_metrics, train

model_dir = Path(tempfile.mkdtemp()) / 'model'

# %% [markdown]
# ## The run as data
#
# Frozen dataclasses describe everything. An `ExitConfig` says after which layer an exit stands; an `ExitWeight` how much its loss counts beside
# the final layer's: $L = L_{final} + \sum_i w_i(t) L_i$. The text is a part of Python's own standard library.

# %%
run = RunConfig(
  model=ModelConfig(
    vocab_size=512,
    num_layers=4,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=176,
    max_length=256,
    exits=(ExitConfig(layer=1), ExitConfig(layer=2)),
  ),
  data=DataConfig(
    mixture=Task('some_modules', PythonLibrarySource(max_files=60)),
    vocabulary=BpeVocabulary(512),
    length=64,
    batch_size=16,
  ),
  objective=ObjectiveConfig(exit_weights=(ExitWeight(start=0.25), ExitWeight(start=0.5))),
  optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=20),
  loop=LoopConfig(train_steps=250, log_period=10, checkpoint_period=250, eval_rows=32),
)
result = train(run, model_dir)
for score in result.scores:
  print(f'{score.name:8} {score.nll:.3f} nats per token  {score.bits_per_byte:.3f} bits per byte')

# %% [markdown]
# Deeper exits predict better. Their losses while training:

# %%
lines = [line for line in read_metrics(model_dir) if 'train/loss' in line]
figure, axes = plt.subplots(figsize=(7, 3.5))
for name in run.model.depth_names:
  axes.plot(
    [line['step'] for line in lines], [line[f'train/{name}/nll'] for line in lines], label=name
  )
axes.set(xlabel='optimizer step', ylabel='nats per token', title='Loss of every exit')
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Quality against depth
#
# With a threshold, a token leaves at the first exit whose confidence is *above* it: 1 never exits, 0 always takes the first exit.

# %%
mesh, rules = make_mesh(run.mesh), ShardingRules()
loaded = load_model(model_dir, mesh=mesh, rules=rules)
data = build_data(run.data, tokenizer=loaded.tokenizer)
with use(mesh, rules):
  report = evaluate(
    loaded, data, EvaluateConfig(rows=32, speed_prompts=2, speed_new_tokens=32, speed_repeats=1)
  )
files = write_report(report, model_dir / 'evaluation')
Image(filename=str(files.picture))

# %% [markdown]
# ## Text, coloured by depth

# %%
model = exitax.load(model_dir)
(completion,) = model.generate('def get_', max_new_tokens=48, threshold=0.5)
colours = dict(zip(model.config.depths, ('#1a7f37', '#0969da', '#cf222e'), strict=True))


def escape(text: str) -> str:
  return text.replace('&', '&amp;').replace('<', '&lt;')


spans = [
  f'<span style="color:{colours[layer]}" title="{layer} layers">{escape(piece)}</span>'
  for piece, layer in zip(completion.pieces, completion.exit_layers, strict=True)
]
legend = ' '.join(f'<b style="color:{colour}">{depth}</b>' for depth, colour in colours.items())
HTML(f'<pre><b>{completion.prompt}</b>{"".join(spans)}</pre>layers: {legend}')

# %%
print(f'{completion.effective_layers:.2f} of {model.config.num_layers} layers per token')

# %% [markdown]
# ## How well does each exit know a text?

# %%
(score,) = model.score('import os\n\n\ndef main():\n  pass\n')
for exit_score in score.exits:
  print(f'{exit_score.name:8} {exit_score.bits_per_byte:.3f} bits per byte')
