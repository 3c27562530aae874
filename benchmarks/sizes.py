"""Fixed sizes at which benchmarks compare, by name; beside them, any variant of `dalle_jax/models/dalle.py`."""

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
  """What compares with `--peer NAME`; None for none. Ends the program with a line where that cannot be, at once."""
  if not name:
    return None
  if jax.default_backend() != 'cpu':
    raise SystemExit('--peer=torch compares on a CPU alone, this is a run on an accelerator; leave it out.')
  try:
    return importlib.import_module(f'benchmarks.{name}_peer')
  except ModuleNotFoundError as e:
    raise SystemExit(f'--peer={name} needs a package that is not here ({e}): pip install {e.name}.') from None


def model(size: str, **changes: Any) -> dalle.DALLE:
  """The DALL-E of SIZES[size], or of the variant of that name, in the type that suits this machine."""
  changes = {'dtype': dtype(), **changes}
  return dalle.build('small', **{**SIZES[size], **changes}) if size in SIZES else dalle.build(size, **changes)


def story(size: str, **changes: Any) -> story_dalle.StoryDALLE:
  """That DALL-E with cross-attention in every block and a story encoder."""
  fields = {'dtype': dtype(), **SIZES.get(size, {}), **changes}
  return story_dalle.build('small' if size in SIZES else size, **fields)
