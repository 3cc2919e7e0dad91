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
# # Early exit while decoding: exact, lossless, certified
#
# One small model, every way of decoding it. A model with exits can *speculate*, which changes no token, or *exit at thresholds*, which changes some:
# how many, and with what guarantee, is measured below. A minute or two on two cores.

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import exitax
from exitax import decode
from exitax.checkpoint import load_model
from exitax.data import BpeVocabulary, DataConfig, PythonLibrarySource, Task, build_data
from exitax.evaluate import EvaluateConfig, evaluate
from exitax.evaluate.advice import AdviseConfig, advise, render_advice, write_advice
from exitax.evaluate.calibration import (
  CalibrateConfig,
  calibrate,
  held_out_examples,
  verdict,
  write_calibration,
)
from exitax.models import DropoutConfig, ExitConfig, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig
from exitax.parallel import ShardingRules, make_mesh, use
from exitax.training import LoopConfig, OptimizerConfig, RunConfig, train

model_dir = Path(tempfile.mkdtemp()) / 'model'

# %% [markdown]
# ## A model made to exit
#
# Exits after layers 1 and 2 of 4. Their losses weigh as much as half the final layer's, and later layers are dropped now and then in training (LayerSkip),
# so that shallow exits are worth drafting with.

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
    exits=tuple(ExitConfig(layer=layer) for layer in (1, 2)),
  ),
  data=DataConfig(
    mixture=Task('some_modules', PythonLibrarySource(max_files=60)),
    vocabulary=BpeVocabulary(512),
    length=64,
    batch_size=16,
  ),
  objective=ObjectiveConfig(exit_weights=(ExitWeight(start=0.5),) * 2),
  dropout=DropoutConfig(layer_rate=0.1),
  optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=20),
  loop=LoopConfig(train_steps=200, log_period=50, checkpoint_period=200, eval_rows=32),
)
result = train(run, model_dir)
for score in result.scores:
  print(f'{score.name:8} {score.nll:.3f} nats per token')

# %% [markdown]
# ## One prompt, every strategy
#
# `speculative` and `full` write the same text. `deferred` and `recompute` write the text of "the first exit that is confident enough", exactly and the
# same; `copy_state` approximates it. Layers per token are what a token was chosen at.

# %%
model = exitax.load(model_dir)
threshold = 0.15
(full,) = model.generate('def get_', max_new_tokens=40, strategy='full')
for strategy in ('full', 'speculative', 'deferred', 'recompute', 'copy_state'):
  settings = {} if strategy in ('full', 'speculative') else {'threshold': threshold}
  (text,) = model.generate('def get_', max_new_tokens=40, strategy=strategy, **settings)
  same = np.mean(np.array(text.tokens) == np.array(full.tokens))
  print(
    f'{strategy:12} {text.effective_layers:.2f} layers per token, {same:4.0%} of the tokens of full depth'
  )

# %% [markdown]
# Sampled text is that of full depth as well: drafts and final layer choose with the same random numbers.

# %%
warm = decode.Sampler(temperature=0.9, top_p=0.95)
texts = [
  model.generate('import ', max_new_tokens=40, strategy=strategy, sampler=warm, seed=7)[0].tokens
  for strategy in ('full', 'speculative')
]
assert texts[0] == texts[1]
print('same seed, same text')

# %% [markdown]
# ## What a round of speculation gains
#
# A round drafts $d$ tokens at an exit whose tokens the final layer accepts with probability $a$, and gains
# $(1 - a^{d+1}) / (1 - a)$ tokens. The lines are this formula with the agreement measured along the text; the points are counted.

# %%
loaded = load_model(model_dir, mesh=make_mesh(run.mesh), rules=ShardingRules())
params = decode.prepare_params(loaded.model, loaded.params)
prompts = [loaded.tokenizer.encode(text) for text in ('def ', 'class ', 'import ', '# ')]


def rounds(policy, forced=None):
  """Rounds, drafts and accepted drafts while four prompts are continued."""
  requests = decode.make_requests(
    loaded.model.config,
    policy=policy,
    samplers=[decode.Sampler()] * len(prompts),
    stop_tokens=(),
    seeds=range(len(prompts)),
    budgets=[96] * len(prompts),
  )
  state = decode.begin(
    loaded.model, params, prompts, policy=policy, requests=requests, max_new_tokens=96
  )
  if forced is not None:
    state.aux.extra[decode.FORCED] = np.tile(np.int32(forced), (len(prompts), 1))
  plan = policy.plan(loaded.model.config)
  state = decode.run_steps(
    loaded.model, params, state, 96, plan=plan, visibility=decode.Causal(None)
  )
  return jax.device_get(state.aux.extra[decode.STATS])


# Exit and number of drafts as data: one program for all points.
by_hand = decode.Speculative(forced=True)
figure, axes = plt.subplots(figsize=(7, 3.5))
lengths = (1, 3, 5, 7)
for index, layer in enumerate((1, 2)):
  found = [rounds(by_hand, forced=(index, d)) for d in lengths]
  agreement = found[0].accepted[:, index].sum() / found[0].drafted[:, index].sum()
  gained = [1 + x.accepted.sum() / x.rounds.sum() for x in found]
  (line,) = axes.plot(
    range(1, 8),
    [float(decode.tokens_per_round(np.float32(agreement), d)) for d in range(1, 8)],
    label=f'exit after layer {layer}: a = {agreement:.2f}',
  )
  axes.plot(lengths, gained, 'o', color=line.get_color())
axes.set(xlabel='drafts per round', ylabel='tokens per round', title='Gain of a round')
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Without fixed numbers the rule of DEL chooses before every round: the exit and the number of drafts with most expected tokens per cost.

# %%
adaptive = rounds(decode.Speculative())
print(
  'drafts made at each exit:',
  adaptive.drafted.sum(axis=0),
  'accepted:',
  adaptive.accepted.sum(axis=0),
)
print(f'tokens per round: {96 * len(prompts) / adaptive.rounds.sum():.2f}')

# %% [markdown]
# ## Which confidence?
#
# A measure is good if, at the same mean depth, more tokens are those of the final layer.

# %%
data = build_data(run.data, tokenizer=loaded.tokenizer)
report = evaluate(loaded, data, EvaluateConfig(rows=32, speed_prompts=0))
figure, axes = plt.subplots(figsize=(7, 3.5))
for measure in decode.OF_SCORES:
  rows = [row for row in report.thresholds if row.confidence == measure.value]
  axes.plot(
    [row.effective_layers for row in rows],
    [100 * row.agreement for row in rows],
    '.-',
    label=measure.value,
  )
axes.set(xlabel='layers per token', ylabel='% as the final layer', title='Agreement against depth')
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A threshold with a guarantee
#
# Learn then Test descends from threshold 1 and stops before the first whose loss it cannot bound: with probability 0.9 over the choice of examples, at most
# 20 % of the tokens differ from those of full depth, on average. A few examples support no more; `exitax calibrate` takes hundreds.

# %%
mesh, rules = make_mesh(run.mesh), ShardingRules()
config = CalibrateConfig(risk=0.2, confidence=0.9, examples=48, prompt_tokens=16, max_new_tokens=16)
calibration = calibrate(loaded, held_out_examples(data, config), config, mesh=mesh, rules=rules)
print(verdict(calibration))
picture, _ = write_calibration(calibration, model_dir)
Image(filename=str(picture))

# %% [markdown]
# ## Does it pay?
#
# `advise` measures what exits agree on and what the parts of a step cost on this machine, predicts every strategy, and checks its best predictions. For a model as small as
# this one a step is mostly overhead, and the honest answer is often no.

# %%
with use(mesh, rules):
  advice = advise(
    loaded,
    data,
    AdviseConfig(
      rows=16, prompts=2, prompt_tokens=16, new_tokens=32, max_drafts=3, part_repeats=3, repeats=2
    ),
    mesh=mesh,
    rules=rules,
  )
print(render_advice(advice).replace(str(model_dir), model_dir.name))
picture, _ = write_advice(advice, model_dir)
Image(filename=str(picture))
