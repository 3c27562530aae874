"""Masks in full, what a token sees of a picture, the kinds of the paper's layers."""

import numpy as np
import pytest

from dalle_jax.layers.patterns import KINDS, Pattern, layer_kinds

MASKS = {  # a prefix of 2, then 2 x 3 image tokens; queries down, keys across
  'full': 'x....... xx...... xxx..... xxxx.... xxxxx... xxxxxx.. xxxxxxx. xxxxxxxx',
  'row': 'x....... xx...... xxx..... xxxx.... xxxxx... xxxxxx.. xx.xxxx. xx..xxxx',
  'column': 'x....... xx...... xxx..... xx.x.... xx..x... xxx..x.. xx.x..x. xx..x..x',
  'conv': 'x....... xx...... xxx..... xxxx.... xx.xx... xxxx.x.. xxxxxxx. xx.xx.xx',
  'wrapped': 'x....... xx...... xxx..... xxxx.... xxxxx... xxxxxx.. xxxxxxx. xxxxxxxx',  # around both edges: all
  'own_row': 'x....... xx...... xxx..... xxxx.... xxxxx... xx...x.. xx...xx. xx...xxx',
  'causal_conv': 'x....... xx...... xxx..... xxxx.... xxxxx... xxx..x.. xxxx.xx. xxxxxxxx',
}


def drawn(text):
  return np.array([[c == 'x' for c in line] for line in text.split()])


@pytest.mark.parametrize('kind', KINDS)
def test_masks_are_these(kind):
  pattern = Pattern(kind, 2, (2, 3), 3)
  np.testing.assert_array_equal(pattern.mask(8), drawn(MASKS[kind]))
  np.testing.assert_array_equal(pattern.mask(5), drawn(MASKS[kind])[:5, :5])
  longer = pattern.mask(10)  # what only fills up sees all, and is seen by none
  np.testing.assert_array_equal(longer[:8, :8], drawn(MASKS[kind]))
  assert not longer[:8, 8:].any() and longer[9].all()


@pytest.mark.parametrize('kind', KINDS)
def test_a_token_sees_what_its_row_of_the_mask_says(kind):
  pattern = Pattern(kind, 2, (2, 3), 3)
  for row, seen in zip(drawn(MASKS[kind])[2:, 2:], pattern.visible(), strict=True):
    assert seen[seen >= 0].tolist() == np.flatnonzero(row).tolist()


def test_conv_reaches_half_its_kernel():
  prefix, w = 4, 16
  mask = Pattern('conv', prefix, (16, 16), 11).mask(prefix + 256)[prefix + 9 * w + 8, prefix:].reshape(16, 16)
  expected = np.zeros((16, 16), bool)
  expected[4:9, 3:14] = expected[9, 3:9] = True
  np.testing.assert_array_equal(mask, expected)


def test_the_pattern_of_the_paper():
  kinds = layer_kinds('paper', 64)
  assert [i for i in range(1, 65) if kinds[i - 1] == 'column'] == [i for i in range(1, 64) if (i - 2) % 4 == 0]
  assert kinds[-1] == 'conv' and kinds.count('conv') == 1 and set(kinds) == {'row', 'column', 'conv'}
  assert layer_kinds('full, row', 3) == ('full', 'row', 'full')
  with pytest.raises(ValueError, match="attention 'full,diagonal' has diagonal; kinds are full, row"):
    layer_kinds('full,diagonal', 4)
  with pytest.raises(ValueError, match="kind 'diagonal' is unknown"):
    Pattern('diagonal', 1, (2, 2)).mask(5)
  with pytest.raises(ValueError, match='conv_kernel 4 is even'):
    Pattern('conv', 1, (2, 2), 4)
