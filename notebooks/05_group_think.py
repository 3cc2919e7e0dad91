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
# # Group Think: several thinkers, one cache, token by token
#
# One model writes several texts at once, and each text sees the others' tokens as they appear (arXiv 2505.11107). Below: a task that can be shared, teachers that see only what the mask
# shows, the mask, a small model that learns to share in a minute or two, its thinkers side by side, and what it gains, by tokens of each and by tokens of all.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from exitax import decode
from exitax.checkpoint import load_model
from exitax.data import ByteTokenizer, GroupDataConfig, GroupMix, GroupRows
from exitax.data.group_tasks import EnumerationTask, Seen, Teacher, duplicate_share, simulate
from exitax.evaluate.groups import (
  GroupEvaluateConfig,
  evaluate_groups,
  render_groups,
  write_group_report,
)
from exitax.layers import Origin, sharing_mask
from exitax.models import ModelConfig
from exitax.parallel import ShardingRules, make_mesh, use
from exitax.training import LoopConfig, OptimizerConfig, RunConfig, muon, train

# %% [markdown]
# ## A task to share
#
# Write every letter of a list, none twice. Nobody is told which part is his: who wants to be fast has to look at what the others have written. The teachers below choose at random among what nobody is seen to
# have written. In the first group each sees every token at once; in the second, tokens that are four steps old; in the third, nothing. Letters that two of them write in the same step are the price of having no plan.

# %%
task = EnumerationTask(num_items=8, alphabet=16)
problem = task.problem(np.random.default_rng(1))
print(problem.prompt)
for name, lag in (('all', 0), ('late', 4), ('nothing', 99)):
  texts = simulate(problem, 3, np.random.default_rng(0), seen=Seen(lag=lag), teacher=Teacher())
  print(
    f'{name:8}',
    *(f'{text:10}' for text in texts),
    f'{duplicate_share(problem, texts):4.0%} written twice',
  )

# %% [markdown]
# ## The mask
#
# All tokens lie in one row, step after step, in the order in which a cache is filled; whose each is, is data. A thinker sees the prompt, its own text, and of the others what
# the visibility says. Training and decoding read the same function.

# %%
tokens = ['p', 'p', 'p'] + [f'{name}{step}' for step in range(4) for name in 'ab']
owner = np.array([[-1] * 3 + [0, 1] * 4])
step = np.array([[-1] * 3 + [s for s in range(4) for _ in 'ab']])
position = np.array([[0, 1, 2] + [3 + 8 * n + s for s in range(4) for n in range(2)]])
figure, axes = plt.subplots(1, 4, figsize=(13, 3.4))
for panel, name in zip(axes, ('full', 'strict', 'lag:2', 'none'), strict=True):
  sees = decode.Sees.parse(name)
  flag = np.zeros_like(owner, bool)
  origin = Origin(
    owner=owner,
    step=step,
    rank=owner,
    lag=owner * 0 + sees.lag,
    by_rank=flag | sees.by_rank,
    sees_all=flag,
  )
  panel.imshow(np.asarray(sharing_mask(origin, origin, position, position))[0], cmap='Greens')
  panel.set(title=name, xticks=range(len(tokens)), yticks=range(len(tokens)), xlabel='is seen')
  panel.set_xticklabels(tokens, fontsize=7)
  panel.set_yticklabels(tokens, fontsize=7)
axes[0].set_ylabel('sees')
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A model that learns it
#
# Rows hold problems with one, two or four thinkers, with names and slots at random, and some whose thinkers see each other late or never: chain of thought, independent sampling
# and a sweep of lags are then all in distribution. `gin/runs/group_think.gin` is the same at four times the length.

# %%
mix = GroupMix(thinkers=(1, 2, 4), lags=(0, 0, 0, 2, -1), slots=4, slot_width=16)
run = RunConfig(
  model=ModelConfig(
    vocab_size=264,
    num_layers=2,
    embed_dim=64,
    num_heads=4,
    head_dim=32,
    mlp_dim=176,
    max_length=128,
    qk_norm=True,
    init_std=0.12,
  ),
  data=GroupDataConfig(tasks=(task,), mix=mix, length=128, batch_size=16, eval_rows=64),
  optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=30, chain=muon),
  loop=LoopConfig(train_steps=400, log_period=100, checkpoint_period=400),
)
row = GroupRows(task, mix, tokenizer=ByteTokenizer(), length=128, seed=0)[0]
print(ByteTokenizer().decode(row.tokens[row.segment_ids == 1]))
model_dir = Path(tempfile.mkdtemp()) / 'model'
result = train(run, model_dir)
print(f'{result.scores[-1].nll:.3f} nats per token')

# %% [markdown]
# ## Thinkers at work
#
# `decode.GroupRun` holds a group step by step; `exitax think` shows the same with words, and `exitax serve` takes groups beside ordinary requests.

# %%
mesh, rules = make_mesh(run.mesh), ShardingRules()
loaded = load_model(model_dir, mesh=mesh, rules=rules)
encode = loaded.tokenizer.encode
group = decode.Group(
  prompt=encode(problem.prompt),
  thinkers=[
    decode.Thinker(header=encode(f'|{name}'), sampler=decode.Sampler(temperature=1.0), seed=3)
    for name in 'ABCD'
  ],
)
thinking = decode.GroupRun(
  loaded.model,
  loaded.params,
  [group],
  decode.ThinkConfig(max_new_tokens=12, slot_width=mix.slot_width),
  stop_tokens=loaded.tokenizer.stop_ids,
)
print('list', problem.prompt.split()[1])
while not thinking.done:
  gains = thinking.advance(1)
  shown = [loaded.tokenizer.decode(gain.tokens.tolist()) or '.' for gain in gains]
  if any(len(gain.tokens) for gain in gains):
    print('  '.join(shown))

# %% [markdown]
# ## Does it pay?
#
# All ways meet the same problems, with the same names, slots and random numbers; bands are 95 % bootstrap intervals. Independent texts stand beside their theory, groups beside teachers who see everything.
# With its cross-mask off the same group falls back to independent texts: it is seeing each other that helps, not a division of labour learnt by heart.

# %%
config = GroupEvaluateConfig(
  thinkers=(4,),
  prompts=60,
  seeds=1,
  tokens=8,
  baselines=True,
  lags=(1, 2, 4),
  speed_steps=8,
  speed_repeats=3,
)
with use(mesh, rules):
  report = evaluate_groups(loaded, task, mix, config, mesh=mesh)
print(render_groups(report))
Image(filename=str(write_group_report(report, model_dir).picture))

# %% [markdown]
# ## What a step costs
#
# A step of N thinkers reads the weights and the shared cache once. Where memory bounds it, t(N) / t(1) = 1 + k (N - 1) t / (W + k (P + t)), with W bytes of weights, k bytes of keys and values per
# token, P tokens of prompt and t of each thinker. For a model of 8 billion parameters in bfloat16 (32 layers, 8 heads of keys and values, 128 channels):

# %%
weights, per_token, prompt = 16e9, 2 * 32 * 8 * 128 * 2, 512
thinkers = np.arange(1, 17)
figure, panel = plt.subplots(figsize=(7, 3.5))
for tokens_each in (256, 1024, 4096):
  ratio = 1 + per_token * (thinkers - 1) * tokens_each / (
    weights + per_token * (prompt + tokens_each)
  )
  panel.plot(thinkers, ratio, '.-', label=f'{tokens_each} tokens each')
panel.set(
  xlabel='thinkers', ylabel='t(N) / t(1)', title='A step of an 8B model, by its reads of memory'
)
panel.legend(frameon=False)
plt.show()
