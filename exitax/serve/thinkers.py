"""What a request says about thinkers: checked, and with the words that they are told."""

from __future__ import annotations

from exitax.data import ThinkTemplate, Tokenizer
from exitax.decode import Sees
from exitax.errors import UserError
from exitax.serve.jobs import Together
from exitax.serve.protocol import CompletionRequest, GenerationRequest
from exitax.serve.refusals import bad_request


def check_thinkers(request: GenerationRequest, *, most: int) -> None:
  """Raises Refusal (400) for fields about thinkers that contradict each other, or too many of them."""
  if request.thinkers is None:
    for name in ('visibility', 'answer_tokens'):
      if getattr(request, name) is not None:
        raise bad_request(f'{name} does nothing without thinkers: leave it out', param=name)
    return
  if request.thinkers > most or most == 1:
    what = f'are more than this server takes, {most}' if most > 1 else 'are not taken here'
    raise bad_request(
      f'thinkers={request.thinkers} {what} (--max_thinkers): ask for fewer', param='thinkers'
    )
  if (request.n or 1) > 1:
    raise bad_request(
      f'n={request.n} with thinkers: a group writes one text each; send several requests', param='n'
    )
  if isinstance(request, CompletionRequest) and request.echo:
    raise bad_request('echo with thinkers: there is no one text to begin with it', param='echo')


def together_of(
  request: GenerationRequest, template: ThinkTemplate, tokenizer: Tokenizer
) -> Together | None:
  """The thinkers that a request asks for.

  Raises:
    Refusal: 400, a visibility that is not known.
  """
  if request.thinkers is None:
    return None
  count = request.thinkers
  headers = [
    template.filled('header', problem='', thinkers=count, thinker=number) for number in range(count)
  ]
  try:
    sees = Sees.parse(request.visibility or 'full')
  except UserError as error:
    raise bad_request(str(error), param='visibility') from None
  return Together(
    headers=tuple(tuple(tokenizer.encode(header)) for header in headers),
    sees=sees,
    answer=tuple(tokenizer.encode(template.filled('answer', problem='', thinkers=count))),
    answer_budget=request.answer_tokens or 0,
  )


def served_template(path: str | None) -> ThinkTemplate:
  """What thinkers of a server are told.

  Raises:
    UserError: as `ThinkTemplate.read`; a header or an answer with the problem in it, which is not known where
      prompts are token ids.
  """
  template = ThinkTemplate.read(path)
  for part in ('header', 'answer'):
    if '{problem}' in getattr(template, part):
      raise UserError(
        f'think_template={path}: {part} has {{problem}}, which a server fills into prompt alone: take it out'
      )
  return template
