"""ExitLM: embedding -> blocks -> exits, as pure functions of a tree of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from exitax.layers import (
  AttendFn,
  Block,
  ExitHead,
  HeadKind,
  RMSNorm,
  Rotary,
  VocabMatrix,
  constrain_stream,
  drop_nothing,
  embed_tokens,
  make_rotary,
  platform,
  rms_normalise,
  vocab_logits,
)
from exitax.models.config import ExitConfig, ExitMatrix, ModelConfig, Remat
from exitax.models.dropout import Dropout

Params = dict[str, Any]
# One block's parameters, the stream, and the number of the layer if something is dropped in it.
BlockFn = Callable[[Params, jax.Array, Any], jax.Array]

MAX_UNROLLED = 16  # Layers; deeper models would take minutes to compile.


@dataclasses.dataclass(frozen=True)
class ExitLM:
  """A model: its configuration and the functions that read its parameters.

  Parameters are a tree of float32 arrays:

    embed/matrix              [vocab, embed]
    blocks/...                every leaf `[num_layers, ...]` (training) or, after `unstack`,
                              a tuple of one tree per layer (decoding); with `LoraConfig`,
                              `lora_a` and `lora_b` beside the kernels
    exits/<layer>/head/...    the exit's head, unless `HeadKind.EMBEDDING`
    exits/<layer>/matrix      [vocab, embed], for `ExitMatrix.OWN`
    shared_exit/matrix        [vocab, embed], if some exit is `ExitMatrix.SHARED`
    norm/scale                [embed]
    head/matrix               [vocab, embed], unless `tie_embeddings`
  """

  config: ModelConfig

  # Parameters.

  def init(self, key: jax.Array) -> Params:
    """Random parameters from a typed `jax.random.key`."""
    return nn.meta.unbox(self._boxed_init(key))

  def abstract_params(self) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct`s; runs nothing on any device."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))

  def logical_axes(self) -> Params:
    """The tree of parameters with, for each leaf, its tuple of logical axis names."""
    boxed = jax.eval_shape(lambda: self._boxed_init(jax.random.key(0)))
    return jax.tree.map(
      lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )

  def unstack(self, params: Params) -> Params:
    """The same parameters with blocks as a tuple, which decoding reads without copying slices."""
    if isinstance(params['blocks'], tuple):
      return params
    layers = range(self.config.num_layers)
    blocks = tuple(jax.tree.map(lambda x, i=i: x[i], params['blocks']) for i in layers)
    return {**params, 'blocks': blocks}

  # Forward, piece by piece.

  def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
    """Residual stream `[..., embed]` of i32 `tokens` `[...]`."""
    hidden = embed_tokens(params['embed']['matrix'], tokens, self.config.precision)
    return constrain_stream(hidden)

  def rotary(self, positions: jax.Array, *, below: int | None = None) -> Rotary:
    """Angles for i32 `positions` `[...]`, all less than `below` if given."""
    return make_rotary(self.config.rope, self.config.head_dim, positions, below=below)

  def run_layers(
    self,
    params: Params,
    hidden: jax.Array,
    *,
    layers: range,
    rotary: Rotary,
    attend: Sequence[AttendFn],
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Runs a span of layers one by one on unstacked parameters.

    Args:
      params: parameters after `unstack`; only the span's blocks are read.
      hidden: residual stream `[..., embed]`.
      layers: indices of the span.
      rotary: angles of the tokens' positions.
      attend: one `AttendFn` per layer of the span.

    Returns:
      The residual stream after the span and the states that the `attend`s returned.
    """
    block = Block(self.config.block)
    states = []
    for layer, attend_fn in zip(layers, attend, strict=True):
      with jax.named_scope(f'layer_{layer}'):
        variables = {'params': params['blocks'][layer]}
        hidden, state = block.apply(variables, hidden, rotary, attend_fn)
      states.append(state)
    return hidden, tuple(states)

  def hidden_at_exits(
    self,
    params: Params,
    hidden: jax.Array,
    *,
    rotary: Rotary,
    attend: AttendFn,
    dropout: Dropout | None = None,
    depth: int | None = None,
  ) -> jax.Array:
    """Runs the (stacked) layers, keeping the stream where exits are.

    Differentiable; nothing is cached. One scan, which compiles a single layer; on the CPU, where a
    scan copies every layer's weights, gradients and activations, shallow models are unrolled.

    Args:
      params: parameters with stacked blocks.
      hidden: residual stream `[batch, length, embed]`.
      rotary: angles of the tokens' positions.
      attend: mixes values within the batch; stateless.
      dropout: what a training step drops.
      depth: how many layers to run; None runs all.

    Returns:
      `[kept, batch, length, embed]`: at the exits up to `depth` and, if it is None, after all layers.
    """
    cfg = self.config
    run_block = self.stateless_block(rotary, attend, dropout)
    depth = cfg.num_layers if depth is None else depth
    layers = None if dropout is None else jnp.arange(depth)
    # Whoever rematerialises is short of memory, not of time; and XLA would undo it between layers.
    shallow = cfg.num_layers <= MAX_UNROLLED and cfg.remat is Remat.NONE
    if platform.on_cpu() and shallow:
      return self._unrolled(run_block, params, hidden, layers, depth)
    return self._scanned(run_block, params, hidden, layers, depth)

  def stateless_block(
    self, rotary: Rotary, attend: AttendFn, dropout: Dropout | None = None
  ) -> BlockFn:
    """A function of one block's parameters, the stream and the layer, rematerialised as configured.

    The layer is its number (i32 scalar), or None without dropout, which alone reads it.
    """
    block = Block(self.config.block)

    def run(block_params: Params, hidden: jax.Array, layer: Any) -> jax.Array:
      drop = drop_nothing if dropout is None else dropout.in_layer(layer)
      with jax.named_scope('layer'):
        after = block.apply({'params': block_params}, hidden, rotary, attend, drop)[0]
        return after if dropout is None else dropout.drop_layer(layer, hidden, after)

    return _rematerialised(run, self.config.remat)

  def exit_features(
    self,
    params: Params,
    exit_config: ExitConfig | None,
    hidden: jax.Array,
    *,
    rotary: Rotary | None,
    attend: AttendFn | None,
  ) -> tuple[jax.Array, Any]:
    """What the exit's vocabulary matrix reads; `exit_config` None means the final head.

    Args:
      params: parameters.
      exit_config: which exit.
      hidden: residual stream at the exit, `[..., embed]`.
      rotary: angles; LAYER heads need them, others take None.
      attend: mixes values; as `rotary`.

    Returns:
      Features `[..., embed]`, and `attend`'s state (None unless the head is a LAYER).
    """
    if exit_config is None:
      scale = params['norm']['scale']
      return rms_normalise(hidden, scale, self.config.norm_epsilon), None
    head = ExitHead(self.config.head_block, exit_config.head)
    exit_params = params.get('exits', {}).get(str(exit_config.layer), {})
    variables = {'params': exit_params.get('head', {})}
    with jax.named_scope(f'exit_{exit_config.layer}'):
      return head.apply(variables, hidden, rotary, attend)

  def vocab_matrix_path(self, exit_config: ExitConfig | None) -> tuple[str, ...]:
    """Where the matrix that an exit (None: the final head) reads stands among the parameters."""
    matrix = ExitMatrix.FINAL if exit_config is None else exit_config.matrix
    if exit_config is not None and matrix is ExitMatrix.OWN:
      return ('exits', str(exit_config.layer), 'matrix')
    if matrix is ExitMatrix.SHARED:
      return ('shared_exit', 'matrix')
    if matrix is ExitMatrix.INPUT or self.config.tie_embeddings:
      return ('embed', 'matrix')
    return ('head', 'matrix')

  def vocab_matrix(self, params: Params, exit_config: ExitConfig | None) -> jax.Array:
    """The `[vocab, embed]` matrix that an exit (None: the final head) reads."""
    node: Any = params
    for name in self.vocab_matrix_path(exit_config):
      node = node[name]
    return node

  def logits(
    self, params: Params, exit_config: ExitConfig | None, features: jax.Array
  ) -> jax.Array:
    """Scores `[..., vocab]` (at least float32) of an exit's features."""
    matrix = self.vocab_matrix(params, exit_config)
    return vocab_logits(matrix, features, self.config.precision)

  # Helpers.

  def _scanned(
    self,
    run_block: BlockFn,
    params: Params,
    hidden: jax.Array,
    layers: jax.Array | None,
    depth: int,
  ) -> jax.Array:
    cfg, num_exits = self.config, len(self.config.exits)
    # Layers without an exit write to a spare row, so that the scan has no branches.
    row_of = {exit_config.layer - 1: i for i, exit_config in enumerate(cfg.exits)}
    rows = jnp.asarray([row_of.get(layer, num_exits) for layer in range(depth)])
    blocks = params['blocks']
    if depth < cfg.num_layers:
      blocks = jax.tree.map(lambda x: x[:depth], blocks)

    def step(carry: tuple[jax.Array, jax.Array], place: Any) -> Any:
      hidden, kept = carry
      block_params, row, layer = place
      hidden = run_block(block_params, hidden, layer)
      return (hidden, jax.lax.dynamic_update_index_in_dim(kept, hidden, row, 0)), None

    # The last layer writes the spare row too: after the scan it holds the final stream.
    kept = jnp.zeros((num_exits + 1, *hidden.shape), hidden.dtype)
    (_, kept), _ = jax.lax.scan(step, (hidden, kept), (blocks, rows, layers))
    return kept[: sum(item <= depth for item in cfg.depths)]

  def _unrolled(
    self,
    run_block: BlockFn,
    params: Params,
    hidden: jax.Array,
    layers: jax.Array | None,
    depth: int,
  ) -> jax.Array:
    kept = []
    for layer, block_params in enumerate(unstack_layers(params['blocks'])[:depth]):
      hidden = run_block(block_params, hidden, None if layers is None else layers[layer])
      if layer + 1 in self.config.depths:
        kept.append(hidden)
    return jnp.stack(kept)

  def _boxed_init(self, key: jax.Array) -> Params:
    cfg = self.config
    keys = _KeyChain(key)
    matrix = VocabMatrix(cfg.vocab_size, cfg.embed_dim, cfg.init_std)
    params: Params = {
      'embed': matrix.init(keys('embed'))['params'],
      'blocks': self._init_blocks(keys('blocks')),
      'norm': RMSNorm(cfg.norm_epsilon).init(keys('norm'), jnp.zeros((1, cfg.embed_dim)))['params'],
    }
    if not cfg.tie_embeddings:
      params['head'] = matrix.init(keys('head'))['params']
    if any(exit_config.matrix is ExitMatrix.SHARED for exit_config in cfg.exits):
      params['shared_exit'] = matrix.init(keys('shared_exit'))['params']
    exits = {
      str(item.layer): self._init_exit(keys(f'exit_{item.layer}'), item) for item in cfg.exits
    }
    # A head that is the vocabulary matrix alone may own nothing: no empty branches in the tree.
    if any(exits.values()):
      params['exits'] = {layer: item for layer, item in exits.items() if item}
    return params

  def _init_blocks(self, key: jax.Array) -> Params:
    block, example = Block(self.config.block), self._example()

    def init(layer_key: jax.Array) -> Any:
      return block.init(layer_key, *example)['params']

    boxed = jax.vmap(init)(jax.random.split(key, self.config.num_layers))
    return jax.tree.map(
      lambda box: box.replace(names=('layers', *box.names)),
      boxed,
      is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )

  def _init_exit(self, key: jax.Array, exit_config: ExitConfig) -> Params:
    cfg, keys = self.config, _KeyChain(key)
    params: Params = {}
    if exit_config.head is not HeadKind.EMBEDDING:
      head = ExitHead(cfg.head_block, exit_config.head)
      params['head'] = head.init(keys('head'), *self._example())['params']
    if exit_config.matrix is ExitMatrix.OWN:
      matrix = VocabMatrix(cfg.vocab_size, cfg.embed_dim, cfg.init_std)
      params['matrix'] = matrix.init(keys('matrix'))['params']['matrix']
    return params

  def _example(self) -> tuple[jax.Array, Rotary, AttendFn]:
    """Arguments of the smallest call of a block, for initialisation."""
    hidden = jnp.zeros((1, 1, self.config.embed_dim), self.config.precision.dtype)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
      del key, value
      return query, None

    return hidden, self.rotary(jnp.zeros((1, 1), jnp.int32)), attend


class _KeyChain:
  """Keys by name: adding an exit does not change how the rest of a model is initialised."""

  def __init__(self, key: jax.Array) -> None:
    self._key = key

  def __call__(self, name: str) -> jax.Array:
    digest = sum(ord(char) * 257**i for i, char in enumerate(name)) % (2**31 - 1)
    return jax.random.fold_in(self._key, digest)


@jax.custom_vjp
def unstack_layers(stacked: Params) -> tuple[Params, ...]:
  """One tree per layer of a tree with leaves `[num_layers, ...]`; gradients are stacked in one go.

  (The gradient of an index is a whole zero array with one row set: num_layers of them to add.)
  """
  return _unstack_layers(stacked)[0]


def _unstack_layers(stacked: Params) -> tuple[tuple[Params, ...], None]:
  num_layers = jax.tree.leaves(stacked)[0].shape[0]
  return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)), None


def _stack_layers(_: None, gradients: tuple[Params, ...]) -> tuple[Params]:
  return (jax.tree.map(lambda *rows: jnp.stack(rows), *gradients),)


unstack_layers.defvjp(_unstack_layers, _stack_layers)


def _rematerialised(run_block: BlockFn, remat: Remat) -> BlockFn:
  match remat:
    case Remat.NONE:
      return run_block
    case Remat.DOTS:
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      return jax.checkpoint(run_block, policy=policy, prevent_cse=False)
    case Remat.FULL:
      return jax.checkpoint(run_block, prevent_cse=False)
