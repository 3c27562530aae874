"""What the recipes set, where a wrong value would go unnoticed."""

import re

import jax
import jax.numpy as jnp
import pytest

from configs import common, folder
from dalle_jax.models import dalle
from dalle_jax.training import optim, sharding


@pytest.mark.parametrize('head', ['linear', 'norm', 'tied'])
def test_by_default_all_weight_matrices_decay_and_nothing_else(head):
  model = dalle.build('test', head=head)
  tokens = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (model.text_length, model.image_length))
  shapes = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), *tokens)['params'])
  mask = sharding.flatten(optim.decay_mask(common.base().optim.decay)({'dalle': shapes}))
  still = r'dalle/((text|image)_embed|\w+_positions|start)|.*(bias|scale)'
  assert {name: not re.fullmatch(still, name) for name in mask} == mask
  assert ('dalle/text_head' in mask) == ('dalle/image_head' in mask) == (head != 'tied')


def test_only_stages_without_captions_flip_the_images_of_a_folder():
  augment = {stage: folder.get_config(stage).data.augment for stage in folder.STAGES}
  assert augment == {'vqgan': 'random_crop,flip', 'clip': 'random_crop', 'dalle': ''}
