"""Images in rows with their captions, as one image."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAD, FONT_SIZE = 6, 14  # pixels
CELL, BOARD = 96, 144  # smallest width of an image in a grid, on a storyboard


def caption_grid(rows: Sequence[tuple[str, Sequence[np.ndarray]]], labels: Sequence[str] = ()) -> Image.Image:
  """One row per caption: its text above its images, uint8[H, W, 3] each; small images are enlarged to 96 pixels.

  `labels` are the titles of the columns. Raises ValueError when there is nothing to show.
  """
  if not rows or not any(len(images) for _, images in rows):
    raise ValueError('there are no images to put into a grid.')
  font = ImageFont.load_default(FONT_SIZE)
  first = next(images[0] for _, images in rows if len(images))
  scale = max(1, -(-CELL // first.shape[1]))
  height, width = first.shape[0] * scale, first.shape[1] * scale
  columns = max(len(images) for _, images in rows)
  total = max(columns * (width + PAD) + PAD, 320)
  line, letters = FONT_SIZE + 4, max(20, int(total / (FONT_SIZE * 0.52)))
  texts = [textwrap.wrap(caption, letters) or [''] for caption, _ in rows]
  head = line + PAD if labels else PAD
  canvas = Image.new('RGB', (total, head + sum(len(t) * line + height + 2 * PAD for t in texts)), 'white')
  draw = ImageDraw.Draw(canvas)
  for i, label in enumerate(labels):
    draw.text((PAD + i * (width + PAD), PAD // 2), label, 'gray', font)
  y = head
  for (_, images), text in zip(rows, texts, strict=True):
    for part in text:
      draw.text((PAD, y), part, 'black', font)
      y += line
    for i, image in enumerate(images):
      cell = Image.fromarray(np.asarray(image)).resize((width, height), Image.Resampling.NEAREST)
      canvas.paste(cell, (PAD + i * (width + PAD), y))
    y += height + 2 * PAD
  return canvas


def storyboard(source: np.ndarray, frames: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
  """The source and the frames of a story in a row, uint8[H, W, 3] each, with the captions under the frames."""
  font = ImageFont.load_default(FONT_SIZE)
  scale = max(1, -(-BOARD // source.shape[1]))
  height, width = source.shape[0] * scale, source.shape[1] * scale
  texts = [_wrap(caption, width, font) for caption in ('source', *captions)]
  line = FONT_SIZE + 4
  size = (len(texts) * (width + PAD) + PAD, height + 2 * PAD + max(map(len, texts)) * line + PAD)
  canvas = Image.new('RGB', size, 'white')
  draw = ImageDraw.Draw(canvas)
  for i, (image, text) in enumerate(zip([source, *frames], texts, strict=True)):
    x = PAD + i * (width + PAD)
    cell = Image.fromarray(np.asarray(image)).resize((width, height), Image.Resampling.NEAREST)
    canvas.paste(cell, (x, PAD))
    for k, part in enumerate(text):
      draw.text((x, height + 2 * PAD + k * line), part, 'gray' if i == 0 else 'black', font)
  return canvas


def _wrap(text: str, width: int, font: Any) -> list[str]:
  """Lines of whole words, at most `width` pixels wide unless a single word is wider."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and font.getlength(longer) > width:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def stacked(images: Sequence[Image.Image]) -> Image.Image:
  """Images one below the other, as one image."""
  canvas = Image.new('RGB', (max(x.width for x in images), sum(x.height for x in images)), 'white')
  y = 0
  for image in images:
    canvas.paste(image, (0, y))
    y += image.height
  return canvas
