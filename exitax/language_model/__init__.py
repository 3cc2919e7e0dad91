"""The front door for notebooks: text in, text out, with the depth of every token."""

from exitax.language_model.loading import load
from exitax.language_model.model import LanguageModel
from exitax.language_model.results import (
  ExitChoice,
  TextCompletion,
  TextEvent,
  TextScore,
  Threshold,
)
from exitax.language_model.thinking import ANSWER, ThinkSettings, ThoughtEvent

__all__ = [
  'ANSWER',
  'ThinkSettings',
  'ThoughtEvent',
  'ExitChoice',
  'LanguageModel',
  'TextCompletion',
  'TextEvent',
  'TextScore',
  'Threshold',
  'load',
]
