"""All ways of decoding one model, beside each other."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.errors import UserError
from exitax.layers import HeadKind
from exitax.models.forward import packed_attend

NEW = 16
THRESHOLDS = np.linspace(1.0, 0.0, 21).tolist()


def _tokens(model, params, prompts, policy):
  return decode.generate(model, params, prompts, max_new_tokens=NEW, policy=policy)


@pytest.mark.parametrize('rows', [1, 8])
def test_exact_strategies_give_the_same_tokens_at_21_thresholds(tiny, prompts, rows):
  model, params = tiny()
  params = decode.prepare_params(model, params)
  batch = (prompts * 2)[:rows]
  seen = set()
  for threshold in THRESHOLDS:
    results = [
      _tokens(model, params, batch, kind(threshold=threshold, pending_capacity=4))
      for kind in (decode.DeferredExit, decode.RecomputeExit)
    ]
    first, second = results
    assert first.tokens == second.tokens, threshold
    for a, b in zip(first.completions, second.completions, strict=True):
      np.testing.assert_array_equal(a.exit_layers, b.exit_layers)
    seen.add(first.effective_layers)
  assert len(seen) > 5


@pytest.mark.parametrize('head', [HeadKind.MLP, HeadKind.LAYER])
def test_recomputed_filling_with_heavier_heads(tiny, prompts, is_oracle, head):
  model, params = tiny(head)
  policy = decode.RecomputeExit(threshold=(0.55, 0.5), pending_capacity=3)
  result = _tokens(model, params, prompts, policy)
  for prompt, completion in zip(prompts, result.completions, strict=True):
    is_oracle(model, params, prompt, completion, policy)


def test_recomputing_runs_early_layers_again(tiny, prompts):
  """As many calls as deferring, over more lanes: a row's first segment runs once a step in both."""
  model, params = tiny()
  policy = decode.RecomputeExit(threshold=0.4, pending_capacity=4)
  result = _tokens(model, params, prompts, policy)
  assert result.completions[0].passes[0] == NEW
  assert result.completions[0].passes[2] < NEW


def _copy_oracle(model, params, prompt, policy):
  """CALM token by token, one layer at a time, with lists for caches."""
  config = model.config
  params = decode.prepare_params(model, params)
  thresholds = np.float32(policy.thresholds(config))
  depths = config.depths
  capacity = 64
  cache = decode.init_cache(config, rows=1, capacity=capacity)
  tokens, layers = list(prompt), []
  for at in range(len(prompt) + NEW - 1):
    lanes = decode.consecutive_lanes(np.array([at]), np.array([1]), num_lanes=1)
    hidden = model.embed(params, np.array([[tokens[at]]]))
    decides = at >= len(prompt) - 1
    chosen = None
    for index, depth in enumerate(depths):
      start = depths[index - 1] if index else 0
      if chosen is None:
        after = decode.extend(
          model,
          params,
          cache,
          hidden,
          lanes,
          layers=range(start, depth),
          visibility=decode.Causal(),
        )
        hidden, cache = after.hidden, after.cache
        if decides:
          head = config.exits[index] if index < len(config.exits) else None
          features, _ = model.exit_features(params, head, hidden, rotary=None, attend=None)
          logits = np.asarray(model.logits(params, head, features))[0, 0]
          probs = np.exp(logits - logits.max())
          if head is None or probs.max() / probs.sum() > thresholds[index]:
            chosen, exit_hidden = depth, hidden
            tokens.append(int(logits.argmax()))
            layers.append(depth)
      else:
        for layer in range(start, depth):
          after = decode.extend(
            model,
            params,
            cache,
            exit_hidden,
            lanes,
            layers=range(layer, layer + 1),
            visibility=decode.Causal(),
          )
          cache = after.cache
  return tokens[len(prompt) :], layers


def test_copied_states_are_those_of_calm(tiny, prompts):
  model, params = tiny()
  policy = decode.CopyStateExit(threshold=0.55)
  result = _tokens(model, params, prompts, policy)
  for prompt, completion in zip(prompts[:2], result.completions[:2], strict=True):
    tokens, layers = _copy_oracle(model, params, prompt, policy)
    assert completion.tokens.tolist() == tokens
    assert completion.exit_layers.tolist() == layers
  assert len(set(np.concatenate([x.exit_layers for x in result.completions]))) == 3
  exact = _tokens(model, params, prompts, decode.DeferredExit(threshold=0.55))
  assert exact.tokens != result.tokens  # Approximate, and here it shows.


def test_copied_states_with_layer_heads_do_not_depend_on_neighbours(tiny, prompts):
  model, params = tiny(HeadKind.LAYER)
  policy = decode.CopyStateExit(threshold=0.55)
  together = _tokens(model, params, prompts, policy)
  for row, prompt in enumerate(prompts):
    assert _tokens(model, params, [prompt], policy).tokens[0] == together.tokens[row]


@pytest.mark.parametrize(
  'measure', [decode.Confidence.PATIENCE, decode.Confidence.COSINE, decode.Confidence.CLASSIFIER]
)
def test_other_measures_decide_as_their_definitions_say(tiny, prompts, all_logits, measure):
  model, params = tiny()
  rng = np.random.default_rng(0)
  width = model.config.embed_dim
  classifiers = {
    str(layer): {'kernel': rng.normal(size=width).astype(np.float32) / 4, 'bias': np.float32(0.3)}
    for layer in (1, 2)
  }
  params = {**params, 'confidence': classifiers}
  threshold = {'patience': 0.5, 'cosine': 0.3, 'classifier': 0.5}[measure.value]
  policy = decode.DeferredExit(threshold=threshold, confidence=measure)
  result = _tokens(model, params, prompts, policy)
  seen = set()
  for prompt, completion in zip(prompts, result.completions, strict=True):
    values = _measured(model, params, [*prompt, *completion.tokens.tolist()], measure, all_logits)
    for i, layer in enumerate(completion.exit_layers):
      at = len(prompt) + i - 1
      above = [
        depth for depth, value in zip((1, 2), values[:, at], strict=True) if value > threshold
      ]
      close = min(abs(values[:, at] - threshold)) < 1e-4
      assert close or layer == (above[0] if above else 4), (i, values[:, at])
      seen.add(int(layer))
  assert len(seen) > 1


def _measured(model, params, sequence, measure, all_logits):
  """Values of a measure at both exits, `[2, length]`, from a pass without caches."""
  tokens = np.zeros((1, 64), np.int32)
  tokens[0, : len(sequence)] = sequence
  positions = jnp.arange(64)[None]
  hidden = model.embed(params, tokens)
  kept = model.hidden_at_exits(
    params,
    hidden,
    rotary=model.rotary(positions),
    attend=packed_attend(jnp.ones_like(tokens), positions, None),
  )
  streams = [np.asarray(hidden[0], np.float64), *np.asarray(kept[:, 0], np.float64)]
  match measure:
    case decode.Confidence.PATIENCE:
      best = np.asarray(all_logits(model, params, tokens))[:, 0].argmax(-1)
      return np.stack([np.zeros(64), best[0] == best[1]]).astype(float)
    case decode.Confidence.COSINE:
      pairs = itertools.pairwise(streams[:3])
      return np.stack(
        [
          (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
          for a, b in pairs
        ]
      )
    case _:
      values = []
      for layer, stream in zip(('1', '2'), streams[1:3], strict=True):
        scaled = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + 1e-6)
        classifier = params['confidence'][layer]
        values.append(1 / (1 + np.exp(-(scaled @ classifier['kernel'] + classifier['bias']))))
      return np.stack(values)


def test_thresholds_fall_as_calm_says_and_one_never_exits(tiny, prompts):
  model, params = tiny()
  kept = _tokens(model, params, prompts, decode.DeferredExit(threshold=0.6))
  fallen = _tokens(model, params, prompts, decode.DeferredExit(threshold=0.6, decay=4.0))
  confidence = np.stack([item.confidences for item in fallen.completions])
  early = np.stack([item.exit_layers for item in fallen.completions]) < 4
  at = 0.6 * (0.9 + 0.1 * np.exp(-4.0 * np.arange(NEW) / NEW))
  assert (confidence > at)[early].all()
  assert ((confidence <= 0.6) & early).any()  # Some exit would not have been taken without decay.
  assert fallen.effective_layers < kept.effective_layers
  never = _tokens(model, params, prompts, decode.DeferredExit(threshold=1.0, decay=4.0))
  assert never.effective_layers == 4.0


def test_log_probs_and_the_best_alternatives(tiny, prompts, all_logits):
  model, params = tiny()
  policy = decode.DeferredExit(threshold=0.5, num_top=3)
  result = _tokens(model, params, prompts, policy)
  for prompt, completion in zip(prompts, result.completions, strict=True):
    sequence = np.zeros((1, 64), np.int32)
    sequence[0, : len(prompt) + NEW] = [*prompt, *completion.tokens]
    logits = np.asarray(all_logits(model, params, sequence), np.float64)[:, 0]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, (token, layer) in enumerate(zip(completion.tokens, completion.exit_layers, strict=True)):
      row = logits[model.config.depths.index(layer), len(prompt) + i - 1]
      assert abs(completion.log_probs[i] - row[token]) < 1e-3
      np.testing.assert_allclose(completion.top_log_probs[i], np.sort(row)[:-4:-1], atol=1e-3)
      assert completion.top_ids[i, 0] == token


# Names.


@pytest.mark.parametrize(
  ('settings', 'kind'),
  [
    ({}, decode.Speculative),
    ({'threshold': 0.5}, decode.DeferredExit),
    ({'strategy': 'full'}, decode.FullDepth),
    ({'strategy': 'recompute', 'threshold': 0.5}, decode.RecomputeExit),
    ({'strategy': 'copy_state', 'threshold': 0.5}, decode.CopyStateExit),
    ({'strategy': 'speculative', 'exit_layer': 1, 'num_drafts': 3}, decode.Speculative),
  ],
)
def test_names_stand_for_policies(tiny, settings, kind):
  model, _ = tiny()
  assert type(decode.StrategySettings(**settings).policy(model.config)) is kind


@pytest.mark.parametrize('given', [(0.5, 0.25), [0.5, 0.25], np.asarray([0.5, 0.25])])
def test_thresholds_come_in_any_sequence(tiny, given):
  model, _ = tiny()
  assert decode.DeferredExit(threshold=given).thresholds(model.config) == (0.5, 0.25)


def test_a_model_without_exits_decodes_at_full_depth(tiny):
  model, _ = tiny(HeadKind.NORM, exits=())
  assert isinstance(decode.StrategySettings().policy(model.config), decode.FullDepth)


def test_a_classifier_that_was_never_trained_is_missed_at_once(tiny, prompts):
  model, params = tiny()
  policy = decode.DeferredExit(threshold=0.5, confidence=decode.Confidence.CLASSIFIER)
  with pytest.raises(UserError, match='confidence=classifier needs classifiers'):
    _tokens(model, params, prompts, policy)


@pytest.mark.parametrize(
  ('settings', 'changes', 'message'),
  [
    ({'strategy': 'fast'}, {}, 'strategy'),
    ({'strategy': 'deferred'}, {}, 'strategy=deferred needs a threshold'),
    ({'strategy': 'full', 'threshold': 0.5}, {}, 'threshold=0.5 has no use in strategy=full'),
    ({'strategy': 'speculative', 'threshold': 1}, {}, 'no use in strategy=speculative'),
    ({'strategy': 'full', 'num_drafts': 2}, {}, 'num_drafts=2 belongs to speculation, not to'),
    ({'strategy': 'full', 'acceptance': 'rejection'}, {}, 'acceptance=rejection belongs to'),
    ({'threshold': 0.5, 'exit_layer': 1}, {}, 'exit_layer=1 belongs to speculation'),
    ({'decay': 4.0}, {}, 'decay=4.0 belongs to strategies with a threshold, not to'),
    ({'strategy': 'full', 'patience': 3}, {}, 'patience=3 belongs to'),
    ({'strategy': 'speculative'}, {'exits': ()}, 'needs exits, and this model has none'),
    ({'threshold': 0.5}, {'exits': ()}, 'strategy=deferred needs exits'),
    ({'confidence': 'certain'}, {}, 'confidence'),
  ],
)
def test_what_a_model_cannot_do_is_said(tiny, settings, changes, message):
  model, _ = tiny(HeadKind.NORM, **changes)
  with pytest.raises(UserError, match=message):
    decode.StrategySettings(**settings).policy(model.config)
