"""The front door for notebooks: text in, text out, with the depth of every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from exitax.checkpoint import (
  CERTIFIED,
  Certificate,
  LoadedModel,
  load_certificate,
  load_classifiers,
  load_sampling,
)
from exitax.data import StreamDecoder, Tokenizer, encode_prompt, pad_documents
from exitax.decode import (
  CacheFormat,
  Completion,
  Confidence,
  ExitPolicy,
  Placement,
  Sampler,
  StopReason,
  Strategy,
  StrategySettings,
  WeightFormat,
  generate,
  stream,
)
from exitax.errors import UserError
from exitax.language_model.results import (
  ExitChoice,
  TextCompletion,
  TextEvent,
  TextScore,
  Threshold,
)
from exitax.language_model.thinking import ThinkSettings, ThoughtEvent, stream_thoughts
from exitax.models import ModelConfig, Params
from exitax.objectives import add_sums, exit_scores, make_score_fn
from exitax.parallel import ShardingRules, shard_batch, use

_SCORE_LENGTH_STEP = 64


class LanguageModel:
  """A trained model with its tokenizer, on a mesh."""

  def __init__(
    self,
    loaded: LoadedModel,
    *,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    weights: WeightFormat = WeightFormat.COMPUTE,
    kv_cache: CacheFormat = CacheFormat.COMPUTE,
  ) -> None:
    self._loaded, self._weights, self._kv_cache = loaded, weights, kv_cache
    self._mesh, self._rules = mesh, rules
    self._decode_params: dict[Placement, Params] = {}
    self._score_fn = jax.jit(make_score_fn(loaded.model))

  def __repr__(self) -> str:
    depths = ', '.join(map(str, self.config.depths))
    return f'LanguageModel({self._loaded.directory}, step {self._loaded.step}, depths {depths})'

  @property
  def config(self) -> ModelConfig:
    """Shape of the model."""
    return self._loaded.model.config

  @property
  def params(self) -> Params:
    """Parameters with stacked blocks."""
    return self._loaded.params

  @property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer of its training."""
    return self._loaded.tokenizer

  @property
  def step(self) -> int:
    """Optimizer steps behind the parameters."""
    return self._loaded.step

  @property
  def certificate(self) -> Certificate:
    """What `exitax calibrate` has certified for these weights.

    Raises:
      UserError: nothing, or for other weights.
    """
    return load_certificate(self._loaded.directory, step=self.step, exits=self.config.depths[:-1])

  @property
  def default_sampler(self) -> Sampler:
    """What the model's `generation.json` asks for; greedy without one.

    Raises:
      UserError: the file is damaged, or a value out of range.
    """
    return Sampler(**load_sampling(self._loaded.directory))  # type: ignore[arg-type]

  def exit_choice(
    self,
    *,
    strategy: str | None,
    threshold: Threshold,
    confidence: str | None,
    max_new_tokens: int,
    temperature: float,
    patience: int = 2,
    decay: float = 0.0,
  ) -> ExitChoice:
    """What a request asks for, with 'certified' put into numbers.

    Args:
      strategy: its name, or None.
      threshold: a number, one per exit, None, or 'certified'.
      confidence: the measure's name; None takes the certificate's, or else 'max_prob'.
      max_new_tokens: tokens per prompt at most.
      temperature: of sampling.
      patience: exits that must agree.
      decay: how fast thresholds fall.

    Raises:
      UserError: another text, no certificate, or a request that it does not speak of.
    """
    if not isinstance(threshold, str):
      return ExitChoice(
        strategy=strategy,
        threshold=threshold,
        confidence=confidence or Confidence.MAX_PROB.value,
      )
    if threshold != CERTIFIED:
      raise UserError(f"threshold={threshold!r} is not known: give a number, or '{CERTIFIED}'")
    certificate = self.certificate
    certificate.check_use(
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      strategy=strategy,
      measure=confidence,
      patience=patience,
      decay=decay,
      weights=self._weights.value,
      kv_cache=self._kv_cache.value,
    )
    return ExitChoice(
      strategy=strategy or certificate.strategy,
      threshold=certificate.threshold,
      confidence=certificate.measure,
    )

  def generate(
    self,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    strategy: str | Strategy | None = None,
    threshold: Threshold = None,
    confidence: str | Confidence | None = None,
    policy: ExitPolicy | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
  ) -> list[TextCompletion]:
    """Continues every prompt.

    Args:
      prompts: one text or several; several are decoded as one batch in which each exits by itself.
      max_new_tokens: tokens per prompt at most.
      strategy: 'full', 'deferred', 'recompute', 'pipeline' (on a mesh with stages), 'copy_state' or
        'speculative'; None takes 'deferred' if there is a threshold, else 'speculative' (the tokens of
        'full', sooner) if there are exits.
      threshold: exit where the confidence is above it, in [0, 1]; one for all exits or one each;
        'certified' for the one that `exitax calibrate` has certified.
      confidence: 'max_prob' (the default), 'margin', 'entropy', 'patience', 'cosine' or 'classifier'.
      policy: a policy of `exitax.decode`, instead of the three.
      sampler: temperature, top-k, top-p, min-p; None takes `default_sampler`.
      seed: prompt i uses seed + i.
      stop: token ids that end a text beside the tokenizer's end id.

    Raises:
      UserError: a threshold out of range, a strategy that the model cannot do, a prompt longer than
        the context, a request that the certificate does not speak of.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    sampler = sampler or self.default_sampler
    policy = policy or self._policy(strategy, threshold, confidence, max_new_tokens, sampler)
    with use(self._mesh, self._rules):
      result = generate(
        self._loaded.model,
        self._prepared(policy),
        [encode_prompt(self.tokenizer, text) for text in texts],
        max_new_tokens=max_new_tokens,
        policy=policy,
        sampler=sampler,
        stop_tokens=(*self.tokenizer.stop_ids, *stop),
        seed=seed,
        cache_format=self._kv_cache,
      )
    return [
      self._as_text(text, completion)
      for text, completion in zip(texts, result.completions, strict=True)
    ]

  def stream(
    self,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    strategy: str | Strategy | None = None,
    threshold: Threshold = None,
    confidence: str | Confidence | None = None,
    policy: ExitPolicy | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
  ) -> Iterator[TextEvent]:
    """Yields the tokens of one continuation as they are chosen; arguments as `generate`."""
    decoder = StreamDecoder(self.tokenizer)
    sampler = sampler or self.default_sampler
    policy = policy or self._policy(strategy, threshold, confidence, max_new_tokens, sampler)
    with use(self._mesh, self._rules):
      events = stream(
        self._loaded.model,
        self._prepared(policy),
        [encode_prompt(self.tokenizer, prompt)],
        max_new_tokens=max_new_tokens,
        policy=policy,
        sampler=sampler,
        stop_tokens=(*self.tokenizer.stop_ids, *stop),
        seed=seed,
        cache_format=self._kv_cache,
      )
      for event in events:
        gain = event.gains[0]
        for i, token in enumerate(gain.tokens.tolist()):
          last = gain.stop_reason is not StopReason.RUNNING and i == len(gain.tokens) - 1
          stopped = last and gain.stop_reason is StopReason.STOP_TOKEN
          piece = '' if stopped else decoder.push(token)
          yield TextEvent(
            piece=piece + decoder.finish() if last else piece,
            token=token,
            exit_layer=int(gain.exit_layers[i]),
            confidence=float(gain.confidences[i]),
          )

  def think(
    self,
    problem: str,
    settings: ThinkSettings = ThinkSettings(),
    *,
    threshold: Threshold = None,
    confidence: str | Confidence | None = None,
    sampler: Sampler | None = None,
    stop: Sequence[int] = (),
  ) -> Iterator[ThoughtEvent]:
    """Lets several thinkers work on a problem at once, each seeing what the others write (Group Think).

    Args:
      problem: put into the template of `settings`.
      settings: how many, how long, who sees whom.
      threshold: exit where the confidence is above it; None runs all layers.
      confidence: as in `generate`.
      sampler: of all thinkers and the answer; None takes `default_sampler`.
      stop: token ids that end a text beside the tokenizer's end id.

    Raises:
      UserError: settings that do not suit the model.
    """
    if threshold == CERTIFIED:
      raise UserError('certificates speak of single texts: with thinkers give a number')
    sampler = sampler or self.default_sampler
    policy = self._policy(
      'full' if threshold is None else 'deferred',
      threshold,
      confidence,
      settings.max_new_tokens,
      sampler,
    )
    with use(self._mesh, self._rules):
      yield from stream_thoughts(
        self._loaded.model,
        self._prepared(policy),
        self.tokenizer,
        problem,
        settings,
        policy=policy,
        sampler=sampler,
        stop_tokens=(*self.tokenizer.stop_ids, *stop),
        cache_format=self._kv_cache,
      )

  def score(self, texts: str | Sequence[str]) -> list[TextScore]:
    """Loss, bits per byte and accuracy of every exit on each text.

    Raises:
      UserError: a text that is empty or longer than the context.
    """
    return [self._score(text) for text in ([texts] if isinstance(texts, str) else texts)]

  def _score(self, text: str) -> TextScore:
    ids = self.tokenizer.encode(text)
    if not ids:
      raise UserError('cannot score an empty text')
    needed = len(ids) + 2  # The start and the end id.
    if needed > self.config.max_length:
      raise UserError(
        f'text of {needed} tokens exceeds the context of {self.config.max_length}: split it'
      )
    length = min(-(-needed // _SCORE_LENGTH_STEP) * _SCORE_LENGTH_STEP, self.config.max_length)
    batch = pad_documents([ids], tokenizer=self.tokenizer, length=length)
    with use(self._mesh, self._rules):
      sums = add_sums([jax.device_get(self._score_fn(self.params, self._place(batch)))])
    bytes_per_token = len(text.encode()) / max(float(sums.tokens), 1.0)
    scores = exit_scores(self._loaded.model, sums, bytes_per_token=bytes_per_token)
    return TextScore(text=text, exits=scores)

  def _place(self, batch: Any) -> Any:
    if self._mesh.shape['data'] == 1:
      return shard_batch(batch, self._mesh, self._rules)
    return batch  # One text does not spread over the data axis.

  def _policy(
    self,
    strategy: str | Strategy | None,
    threshold: Threshold,
    confidence: str | Confidence | None,
    max_new_tokens: int,
    sampler: Sampler,
  ) -> ExitPolicy:
    choice = self.exit_choice(
      strategy=strategy.value if isinstance(strategy, Strategy) else strategy,
      threshold=threshold,
      confidence=confidence.value if isinstance(confidence, Confidence) else confidence,
      max_new_tokens=max_new_tokens,
      temperature=sampler.temperature,
    )
    settings = StrategySettings(
      strategy=choice.strategy, threshold=choice.threshold, confidence=choice.confidence
    )
    return settings.policy(self.config)

  def _prepared(self, policy: ExitPolicy) -> Params:
    """Parameters for a policy, under the model's mesh; kept for those that lie alike."""
    plan, loaded = policy.plan(self.config), self._loaded
    if plan.placement not in self._decode_params:
      self._decode_params[plan.placement] = plan.placement.prepare_params(
        loaded.model, self.params, weights=self._weights
      )
    prepared = self._decode_params[plan.placement]
    if plan.confidence is Confidence.CLASSIFIER:
      classifiers = load_classifiers(
        loaded.directory, step=loaded.step, exits=self.config.depths[:-1]
      )
      if classifiers is not None:
        return {**prepared, 'confidence': classifiers}
    return prepared

  def _as_text(self, prompt: str, completion: Completion) -> TextCompletion:
    tokens = completion.tokens.tolist()
    decoder = StreamDecoder(self.tokenizer)
    shown = tokens[:-1] if completion.stop_reason is StopReason.STOP_TOKEN else tokens
    pieces = [decoder.push(token) for token in shown]
    if pieces:
      pieces[-1] += decoder.finish()
    return TextCompletion(
      prompt=prompt,
      text=''.join(pieces),
      pieces=tuple(pieces),
      tokens=tuple(tokens),
      exit_layers=tuple(completion.exit_layers.tolist()),
      confidences=tuple(completion.confidences.tolist()),
      log_probs=tuple(completion.log_probs.tolist()),
      stop_reason=completion.stop_reason,
    )
