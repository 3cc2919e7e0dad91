"""The shape of an early-exit language model, as frozen data that is checked when made."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection
from typing import Any

from exitax.errors import UserError, choose
from exitax.layers import BlockConfig, HeadKind, LoraConfig, Precision, RopeConfig


class ExitMatrix(enum.Enum):
  """Which vocabulary matrix an exit reads."""

  INPUT = 'input'  # The input embedding.
  FINAL = 'final'  # The final head's matrix (the input embedding when the model ties them).
  SHARED = 'shared'  # One matrix that all exits with this choice share.
  OWN = 'own'  # Its own.


class Remat(enum.Enum):
  """What the backward pass computes again instead of keeping."""

  NONE = 'none'  # Nothing.
  DOTS = 'dots'  # Everything but the results of weight products.
  FULL = 'full'  # Everything but each layer's input.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitConfig:
  """One early exit.

  Attributes:
    layer: number of layers run before it, in [1, num_layers - 1].
    head: what stands before the vocabulary matrix.
    matrix: which vocabulary matrix it reads.
  """

  layer: int
  head: HeadKind = HeadKind.NORM
  matrix: ExitMatrix = ExitMatrix.FINAL

  def __post_init__(self) -> None:
    object.__setattr__(self, 'head', choose(HeadKind, self.head, name='ExitConfig.head'))
    object.__setattr__(self, 'matrix', choose(ExitMatrix, self.matrix, name='ExitConfig.matrix'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder-only early-exit transformer.

  Attributes:
    vocab_size: rows of the vocabulary matrices.
    num_layers: blocks.
    embed_dim: width of the residual stream.
    num_heads: query heads.
    num_kv_heads: key/value heads; 0 means as many as `num_heads`.
    head_dim: width of one head; 0 means `embed_dim / num_heads`.
    mlp_dim: width of the gated hidden layer.
    max_length: longest context in tokens, prompt and generated ones together.
    rope: rotary position embedding.
    norm_epsilon: added to the mean square in RMSNorm.
    qk_norm: RMSNorm on each head's queries and keys (Qwen3).
    qkv_bias: biases on q, k, v (Qwen2).
    output_bias: bias on the attention output.
    sliding_window: number of latest positions a query sees; None sees all (Mistral).
    tie_embeddings: the final head reads the input embedding.
    exits: early exits, by ascending layer.
    init_std: standard deviation of initial weights.
    precision: formats of the computation; parameters are float32.
    remat: what the backward pass recomputes.
    lora: adapters of the blocks' linear maps; None has none.

  Raises:
    UserError: a size that is not positive, heads that do not divide, an exit out of range,
      repeated or out of order.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  mlp_dim: int
  max_length: int
  num_kv_heads: int = 0
  head_dim: int = 0
  rope: RopeConfig = RopeConfig()
  norm_epsilon: float = 1e-5
  qk_norm: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  sliding_window: int | None = None
  tie_embeddings: bool = True
  exits: tuple[ExitConfig, ...] = ()
  init_std: float = 0.02
  precision: Precision = Precision.FLOAT32
  remat: Remat = Remat.NONE
  lora: LoraConfig | None = None

  def __post_init__(self) -> None:
    for name in ('vocab_size', 'num_layers', 'embed_dim', 'num_heads', 'mlp_dim', 'max_length'):
      if getattr(self, name) < 1:
        raise UserError(f'{name}={getattr(self, name)} must be at least 1')
    if not self.norm_epsilon >= 0 or not self.init_std >= 0:
      raise UserError(
        f'norm_epsilon={self.norm_epsilon} and init_std={self.init_std} must be 0 or more'
      )
    if not self.num_kv_heads:
      object.__setattr__(self, 'num_kv_heads', self.num_heads)
    if not self.head_dim:
      if self.embed_dim % self.num_heads:
        raise UserError(
          f'num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}: '
          'choose a divisor or set head_dim'
        )
      object.__setattr__(self, 'head_dim', self.embed_dim // self.num_heads)
    if self.head_dim < 1 or self.head_dim % 2:
      raise UserError(
        f'head_dim={self.head_dim} must be even and positive: rotary turns pairs of channels'
      )
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise UserError(
        f'num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: '
        f'choose {_divisors(self.num_heads)}'
      )
    if self.sliding_window is not None and self.sliding_window < 1:
      raise UserError(f'sliding_window={self.sliding_window} must be at least 1, or None')
    object.__setattr__(self, 'exits', tuple(self.exits))
    object.__setattr__(self, 'precision', choose(Precision, self.precision, name='precision'))
    object.__setattr__(self, 'remat', choose(Remat, self.remat, name='remat'))
    self._check_exits()

  def _check_exits(self) -> None:
    layers = [exit_config.layer for exit_config in self.exits]
    for layer in layers:
      if not 1 <= layer < self.num_layers:
        raise UserError(
          f'exit layer {layer} is out of range: a model of {self.num_layers} layers has exits '
          f'after layers 1 to {self.num_layers - 1}'
        )
      if layers.count(layer) > 1:
        raise UserError(f'exit layer {layer} is repeated: give each exit a layer of its own')
    if layers != sorted(layers):
      raise UserError(f'exit layers {layers} are out of order: list them as {sorted(layers)}')

  @property
  def block(self) -> BlockConfig:
    """The configuration of one block."""
    return BlockConfig(
      embed_dim=self.embed_dim,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      mlp_dim=self.mlp_dim,
      norm_epsilon=self.norm_epsilon,
      rope=self.rope,
      qk_norm=self.qk_norm,
      qkv_bias=self.qkv_bias,
      output_bias=self.output_bias,
      sliding_window=self.sliding_window,
      init_std=self.init_std,
      # GPT-2's scaling: the stream's variance does not grow with the number of layers added to it.
      residual_init_std=self.init_std / (2 * self.num_layers) ** 0.5,
      precision=self.precision,
      lora=self.lora,
    )

  @property
  def head_block(self) -> BlockConfig:
    """The configuration that exit heads are made of: a block without adapters."""
    return dataclasses.replace(self.block, lora=None)

  @property
  def depths(self) -> tuple[int, ...]:
    """Layers run at each exit and, last, by the full model."""
    return (*(exit_config.layer for exit_config in self.exits), self.num_layers)

  @property
  def depth_names(self) -> tuple[str, ...]:
    """Names of `depths` in metrics and tables: `exit_2`, `exit_4`, `final`."""
    return (*(f'exit_{exit_config.layer}' for exit_config in self.exits), 'final')

  def with_exits(self, layers: Collection[int]) -> ModelConfig:
    """The same model with some of its exits: those after `layers`.

    Raises:
      UserError: it has no exit there.
    """
    own = self.depths[:-1]
    for layer in layers:
      if layer not in own:
        there = (
          f'there are exits after layers {", ".join(map(str, own))}' if own else 'there is none'
        )
        raise UserError(f'exits={layer}: the model has no exit after layer {layer}; {there}')
    return dataclasses.replace(
      self, exits=tuple(item for item in self.exits if item.layer in layers)
    )

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values, for the file beside a checkpoint."""
    return _plain(dataclasses.asdict(self))

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
    """Inverse of `to_dict`.

    Raises:
      UserError: a value that is missing, unknown or out of range.
    """
    values = dict(values)
    try:
      rope = RopeConfig(**values.pop('rope'))
      exits = tuple(ExitConfig(**item) for item in values.pop('exits'))
      lora = values.pop('lora', None)
      return cls(rope=rope, exits=exits, lora=lora and LoraConfig(**lora), **values)
    except (KeyError, TypeError) as error:
      raise UserError(f'model configuration does not fit this version of exitax: {error}') from None


def _plain(value: Any) -> Any:
  if isinstance(value, enum.Enum):
    return value.value
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  return value


def _divisors(number: int) -> str:
  return ', '.join(str(d) for d in range(1, number + 1) if number % d == 0)
