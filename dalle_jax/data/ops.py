"""From a stored picture of any kind to a square uint8 RGB array."""

import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 80_000_000  # a larger picture is refused before it is decoded: a few bytes can claim to be gigabytes
AUGMENTS = ('center_crop', 'random_crop', 'flip')
SMALLEST_CROP = 7 / 8  # of the short side, in random crops


def parse_augment(augment: str) -> frozenset[str]:
  """'random_crop,flip' -> its names; '' is center_crop. Raises ValueError for an unknown one."""
  names = frozenset(filter(None, (a.strip() for a in augment.split(','))))
  if unknown := sorted(names - set(AUGMENTS)):
    raise ValueError(f'data.augment has {", ".join(unknown)}; known, joined by commas: {", ".join(AUGMENTS)}.')
  return names


def decode(image: bytes | Image.Image | np.ndarray) -> np.ndarray:
  """Any stored picture as uint8[H, W, 3] RGB; see `to_rgb`."""
  return np.asarray(to_rgb(image))


def to_rgb(image: bytes | Image.Image | np.ndarray, least: int = 0) -> Image.Image:
  """Decodes a picture to 8-bit RGB, upright (EXIF), on white where it is transparent, the first frame if it moves.

  Args:
    image: an encoded file, a PIL image, or uint8 or uint16 of [H, W] or [H, W, 1, 3 or 4].
    least: a JPEG may be decoded to a smaller size (faster), down to this short side.

  Raises ValueError or what Pillow raises (OSError and others) for what is no picture.
  """
  if isinstance(image, np.ndarray):
    image = _from_array(image)
  elif isinstance(image, (bytes, bytearray, memoryview)):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      image = Image.open(io.BytesIO(image))
  elif not isinstance(image, Image.Image):
    raise ValueError(f'a picture is {type(image).__name__}; expected bytes, a PIL image or an array.')
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise ValueError(f'a picture of {width} x {height} pixels is over the limit of {MAX_PIXELS:,}.')
  if least:
    image.draft(None, (least, least))
  image.load()  # a PNG may have its EXIF behind the pixels
  if _orientation(image) != 1:  # else exif_transpose would copy the picture
    image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I;16') or image.mode in ('I', 'F'):
    return _from_deep(np.asarray(image)).convert('RGB')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
  return image if image.mode == 'RGB' else image.convert('RGB')


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except SyntaxError:  # the EXIF of a PNG or WebP is not a TIFF
    return 1


def _from_array(image: np.ndarray) -> Image.Image:
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  shape_fits = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))
  if image.dtype not in (np.uint8, np.uint16) or not shape_fits or not image.size:
    raise ValueError(f'a picture is {image.dtype}{list(image.shape)}; expected uint8 or uint16 [H, W, 1, 3 or 4].')
  return Image.fromarray(image if image.dtype == np.uint8 else _eight_bits(image, 65_535))


def _from_deep(image: np.ndarray) -> Image.Image:
  """A grey picture of more than 8 bits; Pillow's own conversion would clip it to white."""
  if image.dtype.kind == 'f':
    return Image.fromarray(_eight_bits(image, 1.0 if image.max() <= 1 else 255.0))
  return Image.fromarray(_eight_bits(image, 65_535 if image.max() > 255 or image.dtype == np.uint16 else 255))


def _eight_bits(image: np.ndarray, white: float) -> np.ndarray:
  return np.clip(image.astype(np.float32) * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)


def crop(image: Image.Image, size: int, augment: Collection[str], rng: np.random.Generator | None) -> np.ndarray:
  """A square of an RGB picture, resized with antialiasing to uint8[size, size, 3].

  The square is the central one as wide as the short side; with 'random_crop' one of 7/8 to 8/8 of that, anywhere.
  'flip' mirrors every second picture. Without `rng` neither happens: evaluation.
  """
  width, height = image.size
  side = min(width, height)
  if rng is not None and 'random_crop' in augment:
    side = round(side * rng.uniform(SMALLEST_CROP, 1))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
  else:
    left, top = (width - side) // 2, (height - side) // 2
  box = (left, top, left + side, top + side)
  if side == size:
    image = image.crop(box)
  else:
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
  pixels = np.asarray(image)
  if rng is not None and 'flip' in augment and rng.random() < 0.5:
    pixels = pixels[:, ::-1]
  return pixels


def open_image(picture: Any, size: int, name: str) -> np.ndarray:
  """uint8[size, size, 3] from a path, bytes, PIL image or array, cropped; `name` is what an error calls it.

  Raises FileNotFoundError for a path to nothing, ValueError for what is no picture.
  """
  if isinstance(picture, (str, Path)):
    if not Path(picture).is_file():
      raise FileNotFoundError(f'there is no picture {picture}.')
    picture = Path(picture).read_bytes()
  try:
    picture = to_rgb(picture)
  except Exception as e:  # what a broken file makes Pillow raise has no common class
    raise ValueError(f'{name} is no picture that can be read: {" ".join(str(e).split())}') from e
  return crop(picture, size, (), None)


def check_images(images: np.ndarray, size: int) -> None:
  """Raises ValueError unless they are uint8[B, size, size, 3]."""
  if not isinstance(images, np.ndarray):
    raise ValueError(f'pictures are a {type(images).__name__}; expected uint8[B, {size}, {size}, 3].')
  if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
    raise ValueError(f'pictures are {images.dtype}{list(images.shape)}; expected uint8[B, {size}, {size}, 3].')
