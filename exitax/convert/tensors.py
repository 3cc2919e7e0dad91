"""Which tensor of a Hugging Face checkpoint is which part of a parameter tree.

torch keeps a linear map as `[out, in]` and applies its transpose; here it is `[*in, *out]`, heads
apart from channels, and the blocks' leaves have a leading axis of layers:

  model.layers.3.self_attn.q_proj.weight  [heads * head_dim, embed]
  blocks/attention/query/kernel           [layers, embed, heads, head_dim], its row 3
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from exitax.layers import LORA_LEAVES
from exitax.models import ExitLM, ModelConfig
from exitax.parallel import path_name

_TOP = {
  'embed/matrix': 'model.embed_tokens.weight',
  'norm/scale': 'model.norm.weight',
  'head/matrix': 'lm_head.weight',
}
_BLOCKS = 'blocks/'
_EXITS = ('exits/', 'shared_exit/')
_MODULES = {
  'attention_norm/scale': 'input_layernorm.weight',
  'mlp_norm/scale': 'post_attention_layernorm.weight',
  'attention/query_norm/scale': 'self_attn.q_norm.weight',
  'attention/key_norm/scale': 'self_attn.k_norm.weight',
}
LINEARS = {
  'attention/query': 'self_attn.q_proj',
  'attention/key': 'self_attn.k_proj',
  'attention/value': 'self_attn.v_proj',
  'attention/output': 'self_attn.o_proj',
  'mlp/gate': 'mlp.gate_proj',
  'mlp/up': 'mlp.up_proj',
  'mlp/down': 'mlp.down_proj',
}
_SUFFIXES = {
  'kernel': 'weight',
  'bias': 'bias',
  'lora_a': 'lora_A.weight',
  'lora_b': 'lora_B.weight',
}
_MATRICES = ('kernel', *LORA_LEAVES)
_PEFT = 'base_model.model.'
# Linear maps from heads, two axes; all others map from the stream, the MLP or a rank, one axis.
_FROM_HEADS = ('attention/output/kernel', 'attention/output/lora_a')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlace:
  """A tensor and its place.

  Attributes:
    name: in the checkpoint.
    path: of the leaf, such as 'blocks/mlp/up/kernel'.
    layer: row of the leaf that it is; None where it is the whole leaf.
    shape: of the tensor, as torch keeps it.
    leaf_shape: of the leaf, or of its row.
    num_in: leading axes of the leaf's row that are inputs of a linear map; 0 for everything else.
  """

  name: str
  path: str
  layer: int | None
  shape: tuple[int, ...]
  leaf_shape: tuple[int, ...]
  num_in: int

  def from_torch(self, tensor: np.ndarray) -> np.ndarray:
    """The tensor as the leaf has it: a view."""
    if not self.num_in:
      return tensor.reshape(self.leaf_shape)
    inputs, outputs = self.leaf_shape[: self.num_in], self.leaf_shape[self.num_in :]
    split = tensor.reshape(*outputs, *inputs)
    axes = (*range(len(outputs), split.ndim), *range(len(outputs)))
    return split.transpose(axes)

  def to_torch(self, row: np.ndarray) -> np.ndarray:
    """Inverse of `from_torch`, for the leaf or its row: a view."""
    if not self.num_in:
      return row.reshape(self.shape)
    inputs, outputs = self.leaf_shape[: self.num_in], self.leaf_shape[self.num_in :]
    return row.reshape(math.prod(inputs), math.prod(outputs)).T


def tensor_places(config: ModelConfig) -> dict[str, tuple[TensorPlace, ...]]:
  """Leaf path -> its tensors, one per layer or one alone, but for adapters.

  The exits' leaves, which no other library knows, keep their paths as names and their shapes.
  """
  plain = dataclasses.replace(config, lora=None)
  leaves = jax.tree.leaves_with_path(ExitLM(plain).abstract_params())
  return {path_name(path): tuple(_places(path_name(path), leaf.shape)) for path, leaf in leaves}


def adapter_places(config: ModelConfig) -> dict[str, tuple[TensorPlace, ...]]:
  """The same for the leaves of adapters, under the names that PEFT gives them."""
  leaves = jax.tree.leaves_with_path(ExitLM(config).abstract_params())
  return {
    path_name(path): tuple(
      dataclasses.replace(place, name=_PEFT + place.name)
      for place in _places(path_name(path), leaf.shape)
    )
    for path, leaf in leaves
    if path[-1].key in LORA_LEAVES
  }


def is_of_exits(name: str) -> bool:
  """Whether a tensor belongs to the exits, and so into the file beside the backbone's."""
  return name.startswith(_EXITS)


def _places(path: str, shape: tuple[int, ...]) -> Iterator[TensorPlace]:
  if not path.startswith(_BLOCKS):
    name = path if is_of_exits(path) else _TOP[path]
    yield TensorPlace(name=name, path=path, layer=None, shape=shape, leaf_shape=shape, num_in=0)
    return
  inner, row = path.removeprefix(_BLOCKS), shape[1:]
  num_in = 0
  if inner.endswith(_MATRICES):
    num_in = 2 if inner in _FROM_HEADS else 1
  flat = row
  if num_in:
    flat = (math.prod(row[num_in:]), math.prod(row[:num_in]))
  elif inner.endswith('/bias'):
    flat = (math.prod(row),)
  for layer in range(shape[0]):
    yield TensorPlace(
      name=f'model.layers.{layer}.{_module_name(inner)}',
      path=path,
      layer=layer,
      shape=flat,
      leaf_shape=row,
      num_in=num_in,
    )


def _module_name(inner: str) -> str:
  if inner in _MODULES:
    return _MODULES[inner]
  linear, _, leaf = inner.rpartition('/')
  return f'{LINEARS[linear]}.{_SUFFIXES[leaf]}'
