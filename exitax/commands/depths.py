"""Exit depths for the eye: shallow is green, deep is red; plain text lists them instead."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

# From cheap to expensive; distinguishable on dark and on light backgrounds.
_PALETTE = ('green', 'cyan', 'blue', 'magenta', 'red')


def depth_style(layer: int, depths: Sequence[int]) -> str:
  """The colour of an exit among `depths` (ascending, the final layer last)."""
  index = list(depths).index(layer)
  return _PALETTE[round(index * (len(_PALETTE) - 1) / max(len(depths) - 1, 1))]


def coloured(pieces: Sequence[str], layers: Sequence[int], depths: Sequence[int]) -> Text:
  """Pieces of text, each in the colour of its exit."""
  text = Text()
  for piece, layer in zip(pieces, layers, strict=False):
    text.append(piece, style=depth_style(layer, depths))
  return text


def depth_key(layers: Sequence[int], depths: Sequence[int], *, in_colour: bool) -> Text:
  """Which colour stands for which number of layers; without colours, the layers of every token."""
  text = Text('layers per token: ', style='dim')
  if not in_colour:
    return text.append(' '.join(map(str, layers)))
  for layer in depths:
    text.append(f'{layer} ', style=depth_style(layer, depths))
  return text


def depth_summary(layers: Sequence[int], depths: Sequence[int]) -> str:
  """How often each exit was taken, and the mean: `2: 40%  4: 25%  6: 35%  mean 3.9 of 6`."""
  count = max(len(layers), 1)
  shares = '  '.join(f'{depth}: {list(layers).count(depth) / count:.0%}' for depth in depths)
  return f'exits  {shares}  mean {sum(layers) / count:.2f} of {depths[-1]} layers'
