"""The fixed model sizes of the benchmarks, by name; any variant in `dalle_jax/models/dalle.py` can be used, too."""

import importlib
from types import ModuleType
from typing import Any

import jax

from dalle_jax.models import dalle, story_dalle

T = dict(text_length=64, grid=(16, 16), text_vocab=16_384, image_vocab=16_384, attention='full')
D = dict(text_length=256, grid=(32, 32), text_vocab=10_000 + 256, image_vocab=8192, d_model=512, depth=12, heads=8)
SIZES: dict[str, dict[str, Any]] = {
  't_small': dict(T, d_model=256, depth=8, heads=8),
  't_base': dict(T, d_model=512, depth=12, heads=8),
  'd_seed': dict(D, attention='full'),
  'd_seed_sparse': dict(D, attention='row,column,row,conv', period=4),
}


def dtype() -> str:
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def peer(name: str) -> ModuleType | None:
  """Imports the peer of `--peer NAME`, None for ''. Exits with a one-line message if the peer cannot run here."""
  if not name:
    return None
  if jax.default_backend() != 'cpu':
    raise SystemExit('--peer=torch compares only on a CPU, but this is an accelerator; leave it out.')
  try:
    return importlib.import_module(f'benchmarks.{name}_peer')
  except ModuleNotFoundError as e:
    raise SystemExit(f'--peer={name} needs a package that is not installed ({e}); pip install {e.name}.') from None


def model(size: str, **changes: Any) -> dalle.DALLE:
  """Builds the DALL-E of SIZES[size], or of the variant `size`, in the dtype that suits this machine."""
  changes = {'dtype': dtype(), **changes}
  return dalle.build('small', **{**SIZES[size], **changes}) if size in SIZES else dalle.build(size, **changes)


def story(size: str, **changes: Any) -> story_dalle.StoryDALLE:
  """Builds the same DALL-E with cross-attention in every block and a story encoder."""
  fields = {'dtype': dtype(), **SIZES.get(size, {}), **changes}
  return story_dalle.build('small' if size in SIZES else size, **fields)
