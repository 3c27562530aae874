"""VQModel of taming-transformers in the layout of patil-suraj/vqgan-jax, as DALL-E mini uses it.

Files: flax_model.msgpack and config.json, in one folder.
"""

import re
from pathlib import Path

import numpy as np

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported
from dalle_jax.convert.sources import taming

EXPECTED = 'flax_model.msgpack and config.json of vqgan-jax'


def read(path: Path) -> Imported:
  """Reads a VQGAN without discriminator and LPIPS. Raises ValueError or OSError with a one-line message."""
  weights = files.find(path, 'flax_model.msgpack', expected=EXPECTED)
  description = files.find(weights.parent, 'config.json', expected=EXPECTED)
  config = files.config(description)
  if config.get('give_pre_end') or not config.get('resamp_with_conv', True):
    raise ValueError(f'{description} has give_pre_end or resamp_with_conv=false; neither can be read.')
  sizes = files.integers(description, config, 'embed_dim', 'n_embed')
  model = taming.fields(description, config, **sizes)
  theirs: dict[str, np.ndarray] = {}
  for name, x in files.msgpack(weights).items():
    parent, _, leaf = name.rpartition('.')
    parent = re.sub(r'\.(up|down)_(\d+)', r'.\1.\2', parent)
    parent = re.sub(r'(\.(?:up|down)\.\d+)\.(block|attn)_(\d+)', r'\1.\2.\3', parent)
    x = x.transpose(3, 2, 0, 1) if leaf == 'kernel' and x.ndim == 4 else x
    files.add(weights, theirs, f'{parent}.{files.FLAX_LEAVES.get(leaf, leaf)}', x)
  return taming.tokenizer(str(weights), model, theirs)
