"""The colour emoji of a font on this machine: images drawn by people, captioned with their Unicode names."""

import dataclasses
import functools
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalle_jax.data import sources

FOLDERS = (
  '/usr/share/fonts', '/usr/local/share/fonts', '~/.local/share/fonts', '~/.fonts',
  '/System/Library/Fonts', '/Library/Fonts', 'C:/Windows/Fonts',
)  # fmt: skip
FILES = ('NotoColorEmoji.ttf', 'Apple Color Emoji.ttc', 'seguiemj.ttf', 'TwitterColorEmoji*.ttf', 'JoyPixels*.ttf')
SIZES = (109, 160, 136, 128, 96, 72, 64)  # bitmap fonts open only at sizes that they contain; Noto has 109, Apple 160
BLOCKS = (
  (0xA9, 0xA9),
  (0xAE, 0xAE),
  (0x203C, 0x203C),
  (0x2049, 0x2049),
  (0x2100, 0x2BFF),
  (0x3000, 0x32FF),
  (0x1F000, 0x1FAFF),
)
SKIN_TONES, REGIONAL = range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200)  # parts of other emoji
UNASSIGNED = '\U0001fbfb'  # rendered to see what a font draws for a character that it does not have


def find_font() -> str:
  """The path of a colour-emoji font. Raises FileNotFoundError, which names the Debian package, when there is none."""
  for folder in FOLDERS:
    for pattern in FILES:
      for path in sorted(Path(folder).expanduser().rglob(pattern)):
        return str(path)
  raise FileNotFoundError(
    'no colour-emoji font was found; install one (Debian, Ubuntu: apt-get install fonts-noto-color-emoji) '
    'or set config.data.path to its file.'
  )


@functools.lru_cache(maxsize=4)
def _font(path: str) -> ImageFont.FreeTypeFont:
  if not Path(path).is_file():
    raise FileNotFoundError(f'there is no emoji font {path}; expected a colour font such as NotoColorEmoji.ttf.')
  for size in SIZES:
    try:
      return ImageFont.truetype(path, size)
    except OSError as e:
      reason = e
  raise ValueError(f'{path} cannot be opened as a font ({reason}); expected one such as NotoColorEmoji.ttf.')


def render(path: str, character: str) -> np.ndarray:
  """Renders one glyph, centred on a white square: uint8[S, S, 3]; S is 136 for Noto Color Emoji."""
  font = _font(path)
  left, top, right, bottom = font.getbbox(character)
  width, height = int(right - left), int(bottom - top)
  side = max(width, height, 1)
  canvas = Image.new('RGB', (side, side), 'white')
  position = ((side - width) // 2 - left, (side - height) // 2 - top)
  ImageDraw.Draw(canvas).text(position, character, font=font, embedded_color=True)
  return np.asarray(canvas)


cached_render = functools.lru_cache(maxsize=4096)(render)


@functools.lru_cache(maxsize=4)
def characters(path: str) -> tuple[str, ...]:
  """The single characters that the font draws in colour, in code order; of equal ones, the first."""
  looks = {render(path, UNASSIGNED).tobytes()}
  found = []
  for code in (c for first, last in BLOCKS for c in range(first, last + 1)):
    character = chr(code)
    if code in SKIN_TONES or code in REGIONAL or not unicodedata.name(character, ''):
      continue
    image = render(path, character)
    if image.tobytes() not in looks and (image != 255).any():
      looks.add(image.tobytes())
      found.append(character)
  if not found:
    raise ValueError(f'{path} draws no colour emoji; expected a colour-bitmap font such as NotoColorEmoji.ttf.')
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Emoji:
  """Random-access source: `{'image': uint8[S, S, 3], 'caption': Unicode name in lower case}`, with a cache."""

  path: str
  characters: tuple[str, ...] = dataclasses.field(repr=False)

  def __len__(self) -> int:
    return len(self.characters)

  def name(self, index: int) -> str:
    return f'emoji U+{ord(self.characters[index]):04X}'

  def captions(self, index: int) -> list[str]:
    return [unicodedata.name(self.characters[index]).lower()]

  def __getitem__(self, index: int) -> dict:
    return {'image': cached_render(self.path, self.characters[index]), 'caption': self.captions(index)[0]}


def load(split: str, *, path: str = '', val_fraction: float = 0.05, test_fraction: float = 0.05) -> Emoji:
  """The emoji of a split, decided by a hash of the character. `path` is the font file; '' searches the usual places."""
  path = str(Path(path).expanduser()) if path else find_font()
  found = characters(path)
  return Emoji(path, tuple(found[i] for i in sources.divide(found, split, val_fraction, test_fraction)))
