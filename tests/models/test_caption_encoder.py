"""Marked stories, and the encoders that read them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import clip, roberta
from dalle_jax.models.caption_encoder import CaptionEncoder, SpecialIds, Tower, mark_captions
from tests import runs

TEXT = jnp.asarray([[[1, 2, 12], [3, 11, 12]]])  # 10 words, and paddings 10, 11, 12 of the three positions


def test_all_captions_with_a_marker_before_that_of_the_frame():
  ids, mask, own = mark_captions(TEXT, SpecialIds(10, 99))
  assert ids.tolist() == [[99, 1, 2, 3, 14, 15, 16], [1, 2, 99, 3, 14, 15, 16]]
  assert mask.tolist() == [[True] * 4 + [False] * 3] * 2
  assert own[0].tolist() == [True, True, True, False, False, False, False]
  assert own[1].tolist() == [False, False, True, True, False, False, False]


def test_start_and_end_stand_around_the_whole_and_a_cut_story_still_ends():
  text = jnp.asarray([[[7, 1, 8, 0], [7, 2, 3, 8]]])  # start 7, end 8, padding 0
  special = SpecialIds(10, 9, pad=0, start=7, end=8)
  ids, mask, own = mark_captions(text, special, 8)
  assert ids.tolist() == [[7, 9, 1, 2, 3, 8, 0, 0], [7, 1, 9, 2, 3, 8, 0, 0]]
  assert mask[0].tolist() == [True] * 6 + [False] * 2 and own[1].tolist() == [False] * 2 + [True] * 3 + [False] * 3
  ids, mask, own = mark_captions(text, special, 6)  # room for one word a caption
  assert ids.tolist() == [[7, 9, 1, 2, 8, 0], [7, 1, 9, 2, 8, 0]]
  assert own.tolist() == [[False, True, True, False, False, False], [False, False, True, True, False, False]]


def test_the_small_encoder_depends_on_the_whole_story_and_not_on_padding():
  model = CaptionEncoder(text_vocab=13, pad=-1, text_length=3, frames=2, width=8, layers=1, heads=2)
  read = jax.jit(functools.partial(model.apply, runs.parameters(model.init, TEXT)))
  vectors = read(TEXT)
  assert vectors.shape == (1, 2, 8)
  other = read(TEXT.at[0, 1, 0].set(4))
  assert (jnp.abs(other - vectors).max(-1) > 1e-6).all()
  padded = read(TEXT.at[0, 0, 2].set(10))  # another id of a padding
  np.testing.assert_allclose(padded, vectors, rtol=1e-5, atol=1e-6)
  swapped = read(TEXT[:, ::-1])
  assert float(jnp.abs(swapped - vectors[:, ::-1]).max()) > 1e-6


@pytest.mark.parametrize('kind', ['roberta', 'clip'])
def test_frozen_towers(kind):
  config = {'model': {'variant': 'test'}, 'data': {'image_size': 16}}
  if kind == 'roberta':
    config['tokenizer'] = dict(vocab_size=40, length=8, pad=1, start=0, end=2)
    params = runs.parameters(roberta.of_run(config).init, jnp.zeros((1, 8), jnp.int32))['params']
  else:
    config['model'] |= dict(text_pool='end', end=2)
    config['tokenizer'] = dict(vocab_size=40, length=8, pad=1, start=0, end=2)
    net = clip.of_run(config)
    params = runs.parameters(net.init, jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32))['params']
  tower = Tower.of_run(kind, config, 4)
  read = jax.jit(lambda text: tower(params, text))
  text = jnp.asarray([[[0, 5, 2, 1], [0, 6, 2, 1]]])
  vectors = read(text)
  assert vectors.shape == (1, 2, tower.width) and float(jnp.abs(vectors[0, 0] - vectors[0, 1]).max()) > 1e-5
  for changed in (text.at[0, 0, 1].set(9), text.at[0, 1, 1].set(9)):  # a caption changes the vectors of both
    assert (np.abs(read(changed) - vectors).max(-1) > 1e-6).all()


def test_a_clip_without_a_start_has_no_marker():
  config = {'model': {'variant': 'test'}, 'data': {'image_size': 16}, 'tokenizer': {'vocab_size': 32, 'length': 8}}
  with pytest.raises(ValueError, match='has no start of text'):
    Tower.of_run('clip', config, 4)
