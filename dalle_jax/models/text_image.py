"""What models that read captions and generate images have in common: their tokens."""

import jax
import numpy as np


class TextImage:
  """Numbers of tokens and paddings of a module with these fields, whose errors call it `title`.

  Attributes:
    text_vocab: number of text ids, including the padding ids.
    text_length: number of text tokens.
    pad: the padding id; -1 if every text position has its own padding id: the `text_length` highest ids.
    grid: rows and columns of image tokens.
  """

  title = 'the model'
  text_vocab: int
  text_length: int
  pad: int
  grid: tuple[int, int]

  @property
  def image_length(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def words(self) -> int:
    """Size of the text vocabulary, not counting per-position padding ids."""
    return self.text_vocab - (self.text_length if self.pad < 0 else 0)

  @property
  def padding(self) -> np.ndarray:
    """The padding id of each position, int32[T]."""
    if self.pad < 0:
      return np.arange(self.words, self.text_vocab, dtype=np.int32)
    return np.full(self.text_length, self.pad, np.int32)

  def is_word(self, text: jax.Array) -> jax.Array:
    """Which tokens are not padding, bool[B, T]."""
    return text < self.words if self.pad < 0 else text != self.pad

  def check(self, text: jax.Array, image: jax.Array, lengths: range | tuple[int, ...]) -> None:
    """Raises ValueError unless text is [B, text_length] and image [B, one of `lengths`]."""
    if text.shape[1] != self.text_length:
      raise ValueError(
        f'{self.title} takes {self.text_length} text tokens, not {text.shape[1]}; pad or truncate the captions.'
      )
    if image.shape[1] not in lengths:
      raise ValueError(f'{self.title} takes {lengths[0]} to {lengths[-1]} image tokens here, not {image.shape[1]}.')
