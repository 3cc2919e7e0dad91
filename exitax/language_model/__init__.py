"""The front door for notebooks: text in, text out, with the depth of every token."""

from exitax.language_model.model import LanguageModel, load
from exitax.language_model.results import (
  ExitChoice,
  TextCompletion,
  TextEvent,
  TextScore,
  Threshold,
)

__all__ = [
  'ExitChoice',
  'LanguageModel',
  'TextCompletion',
  'TextEvent',
  'TextScore',
  'Threshold',
  'load',
]
