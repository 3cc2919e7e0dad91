"""From a loaded model to a service, with its programs compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from exitax.checkpoint import (
  CERTIFIED,
  LoadedModel,
  load_certificate,
  load_classifiers,
  load_sampling,
)
from exitax.checkpoint.model_dir import TOKENIZER_FOLDER
from exitax.data import Progress, quiet
from exitax.decode import CacheFormat, Confidence, Sampler, WeightFormat, prepare_params
from exitax.errors import UserError, choose
from exitax.serve.admission import WaitingRoom
from exitax.serve.batch import SlotBatch
from exitax.serve.chat import load_chat_template
from exitax.serve.config import ServeConfig
from exitax.serve.engine import Engine
from exitax.serve.metrics import Metrics
from exitax.serve.service import Service
from exitax.serve.strategies import Guarantee, Strategies
from exitax.serve.thinkers import served_template

Ambient = Callable[[], contextlib.AbstractContextManager[None]]


def build_service(
  loaded: LoadedModel,
  config: ServeConfig,
  *,
  ambient: Ambient = contextlib.nullcontext,
  progress: Progress = quiet,
) -> Service:
  """Allocates the cache, compiles, and puts the parts together; the engine is not started.

  Args:
    loaded: model, parameters, tokenizer.
    config: settings.
    ambient: the mesh to work on; entered here and by the engine's thread.
    progress: shows the compilation.

  Raises:
    UserError: settings that do not suit the model.
  """
  model_config = loaded.model.config
  context = config.context(model_config.max_length)
  weights = choose(WeightFormat, config.weights, name='weights')
  cache_format = choose(CacheFormat, config.kv_cache, name='kv_cache')
  if config.max_logprobs > model_config.vocab_size:
    raise UserError(
      f'max_logprobs={config.max_logprobs} exceeds the vocabulary of {model_config.vocab_size}'
    )
  strategies = Strategies(
    model_config,
    confidence=config.confidence,
    default=config.strategy,
    threshold=config.threshold,
    num_top=config.max_logprobs,
    guarantee=_guarantee(loaded, config),
    max_thinkers=config.thinkers,
  )
  classifiers = _classifiers(loaded) if strategies.confidence is Confidence.CLASSIFIER else None
  template = load_chat_template(
    config.chat_template, tokenizer_folder=loaded.directory / TOKENIZER_FOLDER
  )
  think_template = served_template(config.think_template)
  sampling = load_sampling(loaded.directory)
  Sampler(**sampling)  # type: ignore[arg-type]  # Out of range is said now, not to clients.
  metrics = Metrics()
  with ambient():
    params = prepare_params(loaded.model, loaded.params, weights=weights)
    batch = SlotBatch(
      loaded.model,
      params if classifiers is None else {**params, 'confidence': classifiers},
      plans=strategies.layout_first,
      num_slots=config.num_slots,
      capacity=context,
      prefix_bytes=config.prefix_cache_bytes,
      max_thinkers=config.thinkers,
      group_plans=strategies.of_groups,
      cache_format=cache_format,
    )
    programs = batch.programs()
    for compile_program in progress(programs, total=len(programs), label='compiling'):
      compile_program()
  engine = Engine(
    batch,
    plans=strategies.plans,
    room=WaitingRoom(
      capacity=config.max_queue, slots=config.num_slots, queue_timeout=config.queue_timeout
    ),
    metrics=metrics,
    request_timeout=config.request_timeout,
    ambient=ambient,
  )
  return Service(
    name=loaded.directory.resolve().name,
    tokenizer=loaded.tokenizer,
    vocab_size=model_config.vocab_size,
    context=context,
    max_logprobs=config.max_logprobs,
    strategies=strategies,
    template=template,
    think_template=think_template,
    max_thinkers=config.thinkers,
    engine=engine,
    metrics=metrics,
    sampling=sampling,
  )


def _classifiers(loaded: LoadedModel) -> dict[str, Any]:
  exits = loaded.model.config.depths[:-1]
  found = load_classifiers(loaded.directory, step=loaded.step, exits=exits)
  if found is None:
    raise UserError(
      'confidence=classifier needs classifiers, one per exit: train them with '
      f'`exitax tune-confidence --model_dir={loaded.directory}`'
    )
  return found


def _guarantee(loaded: LoadedModel, config: ServeConfig) -> Guarantee | None:
  """What the model's certificate says; None without one that counts, unless it is asked for."""
  try:
    certificate = load_certificate(
      loaded.directory, step=loaded.step, exits=loaded.model.config.depths[:-1]
    )
  except UserError:
    if config.threshold == CERTIFIED:
      raise
    return None
  return Guarantee(certificate, weights=config.weights, kv_cache=config.kv_cache)
