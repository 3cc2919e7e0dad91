r"""exitax: language models that can stop early, in JAX.

    import exitax

    model = exitax.load('runs/quickstart')
    for completion in model.generate(['def main(', 'import '], threshold=0.8):
      print(completion.text, completion.exit_layers)
    model.score(['import os\n'])

The folders are importable by themselves: `exitax.models`, `exitax.training`, `exitax.decode`, ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from exitax.errors import UserError
  from exitax.language_model import LanguageModel, TextCompletion, TextScore, load

# Public name -> module. Imported when first used, so that `import exitax` costs nothing.
_FRONT_DOOR = {
  'LanguageModel': 'exitax.language_model',
  'TextCompletion': 'exitax.language_model',
  'TextScore': 'exitax.language_model',
  'UserError': 'exitax.errors',
  'load': 'exitax.language_model',
}

__all__ = ['LanguageModel', 'TextCompletion', 'TextScore', 'UserError', 'load']


def __getattr__(name: str) -> Any:
  if name in _FRONT_DOOR:
    return getattr(importlib.import_module(_FRONT_DOOR[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *_FRONT_DOOR})
