import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.functional import gan, losses, pixels


def test_token_loss_by_hand():
  p = np.array([[[0.7, 0.3], [0.4, 0.6]], [[0.1, 0.9], [0.8, 0.2]]])
  tokens = jnp.array([[0, 0], [1, 1]])
  rows = np.array([-(np.log(0.7) + np.log(0.4)) / 2, -(np.log(0.9) + np.log(0.2)) / 2])
  loss, accuracy = losses.token_loss(jnp.log(p), tokens)
  assert float(loss) == pytest.approx(rows.mean(), rel=1e-5) and float(accuracy) == 0.5
  loss, accuracy = losses.token_loss(jnp.log(p), tokens, jnp.array([0.0, 1.0]))
  assert float(loss) == pytest.approx(rows[1], rel=1e-5) and float(accuracy) == 0.5
  assert float(losses.token_loss(jnp.log(p), tokens, jnp.zeros(2))[0]) == 0.0


def test_pixels_go_there_and_back():
  values = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
  assert pixels.to_float(values).min() == -1 and pixels.to_float(values).max() == 1
  np.testing.assert_array_equal(pixels.to_uint8(pixels.to_float(values)), values)
  assert pixels.to_uint8(jnp.array([-3.0, 3.0])).tolist() == [0, 255]


def test_the_first_token_counts_as_several():
  logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
  tokens = jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
  loss, accuracy = losses.token_loss(logits, tokens, first=3.0)
  np.testing.assert_allclose(loss, (3 * nll[:, 0] + nll[:, 1:].sum(1)).mean() / 6, rtol=1e-6)
  assert accuracy == losses.token_loss(logits, tokens)[1]


def test_cross_entropy_of_discriminators_does_not_saturate():
  logits = jnp.array([-2.0, 0.0, 3.0])
  p = 1 / (1 + np.exp(-np.asarray(logits)))
  assert float(gan.bce(logits, 1.0)) == pytest.approx(-np.log(p).mean(), rel=1e-5)
  assert float(gan.bce(logits, 0.0)) == pytest.approx(-np.log(1 - p).mean(), rel=1e-5)
  assert float(gan.bce_discriminator(logits, logits[:1], logits[2:])) == pytest.approx(
    -np.log(p).mean() - (np.log(1 - p[0]) + np.log(1 - p[2])) / 2, rel=1e-5
  )
  far = jnp.array([-200.0])  # where probabilities are 0 and 1
  assert float(gan.bce(far, 1.0)) == pytest.approx(200.0)
  assert float(jax.grad(lambda x: gan.bce(x, 1.0))(far)[0]) == pytest.approx(-1.0)
