import jax
import numpy as np
import pytest

from exitax.decode.scores import exit_logits
from exitax.layers import HeadKind
from exitax.models import ExitConfig, ExitMatrix


@pytest.mark.parametrize('matrix', ExitMatrix)
def test_scores_equal_the_models(tiny, matrix):
  exits = (ExitConfig(layer=2, matrix=matrix),)
  model, params = tiny(HeadKind.NORM, exits=exits, tie_embeddings=False)
  features = jax.random.normal(jax.random.key(1), (3, model.config.embed_dim))
  for exit_config in (exits[0], None):
    ours = jax.jit(lambda x, e=exit_config: exit_logits(model, params, e, x))(features)
    np.testing.assert_allclose(
      ours, model.logits(params, exit_config, features), rtol=1e-5, atol=1e-4
    )
