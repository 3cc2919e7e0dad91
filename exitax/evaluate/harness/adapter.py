"""A model of exitax as lm-evaluation-harness knows models. The only importer of `lm_eval` by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from exitax.checkpoint import LoadedModel
from exitax.data import begin_prompt, start_id
from exitax.decode import Sampler
from exitax.errors import UserError
from exitax.evaluate.harness.library import ChatFn
from exitax.evaluate.harness.rows import Row
from exitax.evaluate.harness.scoring import Scorer
from exitax.evaluate.harness.writing import TextRequest, TextWriter

# The harness' own default where a task does not say.
_MAX_NEW_TOKENS = 256
# What tasks write and what then changes nothing here.
_NEUTRAL = {'num_beams': 1, 'repetition_penalty': 1.0, 'num_return_sequences': 1, 'use_cache': True}
_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p')

# A request as the base class passes it on: the two texts, and the ids of each.
_EncodedPair = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclasses.dataclass
class LayerMeter:
  """Layers that tokens took, scored and written ones together."""

  layers: int = 0
  tokens: int = 0

  def add(self, layers: Sequence[int] | np.ndarray) -> None:
    """Counts tokens by the layers of each."""
    self.layers += int(np.sum(layers))
    self.tokens += len(layers)

  @property
  def mean(self) -> float | None:
    """Layers per token; None before the first one."""
    return self.layers / self.tokens if self.tokens else None


class ExitaxLM(TemplateLM):
  """One row of a table: a model that leaves its stack of layers in one way.

  Prompts begin as the tokenizer says (`prompt_ids`), and a text with nothing before it follows the start
  of a document. Scores and greedy texts at full depth are those of the harness' own `HFLM` on the same weights
  (tested), its habit included of predicting a start token that `loglikelihood_rolling` finds in front of a text.

  Attributes:
    meter: layers of all tokens so far.
  """

  def __init__(
    self,
    loaded: LoadedModel,
    row: Row,
    *,
    scorer: Scorer,
    writer: TextWriter,
    chat: ChatFn | None = None,
  ) -> None:
    """Takes a model.

    Args:
      loaded: the model.
      row: how tokens leave.
      scorer: of the same model, made for this row among others.
      writer: of the same model.
      chat: makes a prompt of messages; None where the harness is not told to.
    """
    super().__init__()
    self._tokenizer, self._config = loaded.tokenizer, loaded.model.config
    self._row, self._scorer, self._writer, self._chat = row, scorer, writer, chat
    self.meter = LayerMeter()

  @property
  def eot_token_id(self) -> int:
    return self._tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return start_id(self._tokenizer)

  @property
  def max_length(self) -> int:
    """Longest context in tokens."""
    return self._config.max_length

  @property
  def tokenizer_name(self) -> str:
    return self._tokenizer.digest

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Ids of a text, behind the start of a prompt unless it is told not to."""
    del kwargs
    ids = self._tokenizer.encode(string)
    # Without ids that begin a prompt nothing is added: the base class counts on it.
    begins = add_special_tokens is not False and bool(self._tokenizer.prompt_ids)
    return begin_prompt(self._tokenizer, ids) if begins else ids

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """The prompt for the next answer.

    Raises:
      UserError: no template was given, or the task wants the beginning of an answer in it.
    """
    if self._chat is None:
      raise UserError('no chat template was given: pass chat=, or --apply_chat_template')
    if not add_generation_prompt:
      raise UserError(
        'the task begins answers itself (gen_prefix), which chat templates here cannot: leave '
        '--apply_chat_template out'
      )
    return self._chat(chat_history)

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[tuple[float, bool]]:
    """Log-probability of each continuation, and whether greedy decoding would write it."""
    return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

  def _loglikelihood_tokens(
    self, requests: Sequence[_EncodedPair], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    del kwargs
    # Nothing to score is certain; it can happen where the continuation melts into the last token.
    places = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
    texts = [
      self._scorer.fit(requests[i][1] or [self.prefix_token_id], requests[i][2]) for i in places
    ]
    answers = [(0.0, True)] * len(requests)
    depths = np.asarray(self._scorer.depths)
    for i, table in zip(places, self._scorer(texts), strict=True):
      exits = self._row.choose_exits(table, depths=self._scorer.depths)
      tokens = np.arange(table.num_tokens)
      nll = float(np.sum(table.nll[exits, tokens], dtype=np.float64))
      answers[i] = (-nll, bool(np.all(table.correct[exits, tokens])))
      self.meter.add(depths[exits])
    for (pair, _, _), answer in zip(requests, answers, strict=True):
      if pair is not None:
        self.cache_hook.add_partial('loglikelihood', pair, answer)
    return answers

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[float]:
    """Log-probability of each whole text, in windows of the whole context."""
    del disable_tqdm
    windows: list[_EncodedPair] = []
    owners: list[int] = []
    for owner, request in enumerate(requests):
      pairs = get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for context, continuation in map(make_disjoint_window, pairs):
        windows.append((None, context, continuation))
        owners.append(owner)
    totals = [0.0] * len(requests)
    for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
      totals[owner] += score
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    """A text after each context, until a stop string.

    Raises:
      UserError: more tokens than the context holds, or settings of generation that are not known.
    """
    del disable_tqdm
    # Repeats of one request differ by their seeds.
    wanted = [self._text_request(request, seed=i) for i, request in enumerate(requests)]
    written = self._writer(wanted, policy=self._row.policy)
    for request, text in zip(requests, written, strict=True):
      self.meter.add(text.exit_layers)
      self.cache_hook.add_partial('generate_until', request.args, text.text)
    return [text.text for text in written]

  def _text_request(self, request: Instance, *, seed: int) -> TextRequest:
    arguments: tuple[Any, ...] = request.args
    context, settings = arguments
    name = request.task_name or 'the task'
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
    max_new_tokens, stops = kwargs.pop('max_gen_toks'), kwargs.pop('until')
    room = self.max_length - max_new_tokens
    if room < 1:
      raise UserError(
        f'{name} asks for max_gen_toks={max_new_tokens}, and the context is {self.max_length}: '
        'lower it in a copy of the task (--task_path), or take a model with a longer context'
      )
    prompt = begin_prompt(self._tokenizer, self._tokenizer.encode(context))
    return TextRequest(
      prompt=tuple(prompt[-room:]),
      max_new_tokens=max_new_tokens,
      stops=tuple(stops),
      sampler=_sampler(kwargs, task=name),
      seed=seed,
    )


def _sampler(kwargs: Mapping[str, Any], *, task: str) -> Sampler:
  """How tokens are chosen, by the settings of a task.

  Raises:
    UserError: a setting that is not known.
  """
  unknown = {
    name: value
    for name, value in kwargs.items()
    if name not in ('do_sample', *_SAMPLING)
    and value is not None
    and not (name in _NEUTRAL and value == _NEUTRAL[name])
  }
  if unknown:
    listed = ', '.join(f'{name}={value!r}' for name, value in unknown.items())
    raise UserError(
      f'{task} generates with {listed}, and exitax knows do_sample, {", ".join(_SAMPLING)}: '
      'leave it out in a copy of the task (--task_path)'
    )
  if not kwargs.get('do_sample'):
    return Sampler()
  given = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
  return Sampler(**{'temperature': 1.0, **given})
