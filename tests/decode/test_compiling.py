import jax
import jax.numpy as jnp
import pytest

from exitax.decode.compiling import decode_jit


@decode_jit(static=('times',), donated=('x',))
def _scaled(x, y, *, times):
  """Documented."""
  return x * times + y


def test_it_is_the_function_jitted_with_donation():
  x = jnp.arange(4.0)
  assert _scaled(x, 1.0, times=3).tolist() == [1.0, 4.0, 7.0, 10.0]
  assert x.is_deleted()
  assert _scaled.__doc__ == 'Documented.'


def test_it_becomes_part_of_a_larger_program():
  outer = jax.jit(lambda x: _scaled(x, 1.0, times=2).sum())
  assert outer(jnp.arange(3.0)) == 9.0
  assert jax.eval_shape(lambda x: _scaled(x, x, times=2), jnp.zeros(5)).shape == (5,)


def test_products_of_a_few_rows_are_left_to_the_library_that_does_not_repack_weights():
  if jax.default_backend() != 'cpu':
    pytest.skip('the option is for the CPU')
  product = decode_jit(static=(), donated=())(lambda x, w: x @ w)
  shapes = jax.ShapeDtypeStruct((8, 512), 'float32'), jax.ShapeDtypeStruct((512, 512), 'float32')
  assert 'ynn' not in product.jitted.lower(*shapes).compile().as_text()
