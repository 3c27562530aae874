"""Images from captions by a DALL-E mini: `DallEMini.load('runs/dalle_mini').sample(['a red circle'], n=8, seed=0)`."""

from collections.abc import Sequence
from typing import Any

from dalle_jax.models import dalle_mini
from dalle_jax.pipelines import dalle


class DallEMini(dalle.DallE):
  """As `DallE`, for runs of a DALL-E mini, which cannot complete captions."""

  OBJECTIVE = 'dalle_mini'

  def complete_captions(self, prompts: Sequence[str], n: int = 1, seed: int = 0, **options: Any) -> list[list[str]]:
    """Raises ValueError: the model only reads text."""
    raise ValueError('a DALL-E mini only reads captions and cannot complete them; leave out --complete.')

  def _network(self) -> dalle_mini.DALLEMini:
    ids = dalle_mini.caption_ids(self.config['tokenizer'])
    return dalle_mini.build(**{**self.config['model'], **self.sizes, **ids})


draw = dalle.draw  # what `dalle_jax.aot` compiles
load = DallEMini.load
