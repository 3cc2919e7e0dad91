"""The matrix products of a decoding step, timed alone: what XLA's own products leave of the roofline."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from exitax.decode.compiling import decode_jit
from exitax.decode.scores import exit_logits
from exitax.layers import project
from exitax.models import ExitLM, Params


class DecodeProducts:
  """Called, it runs the products with weights of `num_steps` steps at full depth, and nothing else.

  Each product's input depends on the one before it, as in a model; attention, norms, the cache and
  the choice of tokens are left out.
  """

  def __init__(self, model: ExitLM, params: Params, *, batch: int, num_steps: int) -> None:
    """Compiles by running once; as many key heads as query heads, `params` of `prepare_params`."""
    self._model, self._params, self._num_steps = model, params, num_steps
    self._rows = jnp.ones((batch, model.config.embed_dim))
    self()

  def __call__(self) -> jax.Array:
    return jax.block_until_ready(_run(self._model, self._params, self._rows, self._num_steps))


@decode_jit(static=('model',), donated=())
def _run(model: ExitLM, params: Params, rows: jax.Array, num_steps: int) -> jax.Array:
  return jax.lax.fori_loop(0, num_steps, lambda _, x: _step(model, params, x), rows)


def _step(model: ExitLM, params: Params, x: jax.Array) -> jax.Array:
  cfg = model.config

  def apply(linear: Params, x: jax.Array) -> jax.Array:
    return project(x, linear['kernel'].reshape(x.shape[-1], -1), cfg.precision)

  for block in params['blocks']:
    attention, mlp = block['attention'], block['mlp']
    query, key, value = jnp.split(apply(attention['query_key_value'], x), 3, axis=1)
    x = apply(attention['output'], query + key + value)
    gate, up = jnp.split(apply(mlp['gate_up'], x), 2, axis=1)
    x = apply(mlp['down'], gate * up)
  scores = exit_logits(model, params, None, x)
  return jnp.tanh(scores[:, : cfg.embed_dim])
