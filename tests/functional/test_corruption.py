import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.functional import corruption

RNG = jax.random.key(0)


def test_the_share_of_replaced_tokens_is_the_rate_or_spread_around_it():
  tokens = jnp.full((400, 100), 7)
  changed = lambda **kw: np.asarray(corruption.replace_tokens(RNG, tokens, 0.5, 1000, **kw) != 7).mean(1)
  assert abs(changed().mean() - 0.5) < 0.01 and changed().std() < 0.07
  rates = changed(spread=0.5)
  assert abs(rates.mean() - 0.5) < 0.05 and rates.min() < 0.05 and rates.max() > 0.95
  assert abs((rates < 0.25).mean() - 0.25) < 0.07  # uniform
  noise = corruption.replace_tokens(RNG, tokens, 1.0, 16)
  assert set(np.unique(noise).tolist()) == set(range(16))


def test_dropped_captions_are_padding_and_counted():
  text, padding = jnp.zeros((100, 3, 4), jnp.int32), jnp.arange(1, 5)
  dropped, kept = corruption.drop_captions(RNG, text, 0.25, padding)
  assert kept.shape == (100, 3) and abs(float(kept.mean()) - 0.75) < 0.1
  np.testing.assert_array_equal(dropped, np.where(np.asarray(kept)[..., None] > 0, 0, padding))
