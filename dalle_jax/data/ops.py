"""From a stored image of any kind to a square uint8 RGB array."""

import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

TURNS = {  # EXIF orientation -> what makes the image upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 80_000_000  # a larger image is refused before it is decoded: a few bytes can claim to be gigabytes
AUGMENTS = ('center_crop', 'random_crop', 'flip')
SMALLEST_CROP = 7 / 8  # side of the smallest random crop, as a fraction of the short side of the image


def parse_augment(augment: str) -> frozenset[str]:
  """Splits 'random_crop,flip' into its names; '' means center_crop. Raises ValueError for an unknown name."""
  names = frozenset(filter(None, (a.strip() for a in augment.split(','))))
  if unknown := sorted(names - set(AUGMENTS)):
    raise ValueError(
      f'data.augment has {", ".join(unknown)}; expected names of {", ".join(AUGMENTS)}, joined by commas.'
    )
  return names


def decode(image: bytes | Image.Image | np.ndarray) -> np.ndarray:
  """Any stored image as uint8[H, W, 3] RGB; see `to_rgb`."""
  return np.asarray(to_rgb(image))


def to_rgb(image: bytes | Image.Image | np.ndarray, least: int = 0) -> Image.Image:
  """Decodes an image to 8-bit RGB: upright (EXIF), on white where it is transparent, the first frame if animated.

  Args:
    image: an encoded file, a PIL image, or uint8 or uint16 of [H, W] or [H, W, 1, 3 or 4].
    least: if positive, a JPEG may be decoded at a reduced size (faster) whose short side is at least this long.

  Raises ValueError, or what Pillow raises (OSError and others), for anything that is not an image.
  """
  if isinstance(image, np.ndarray):
    image = _from_array(image)
  elif isinstance(image, (bytes, bytearray, memoryview)):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      try:
        image = Image.open(io.BytesIO(image))
      except UnidentifiedImageError as e:  # whose message is the address of the BytesIO
        raise UnidentifiedImageError('cannot identify the image format') from e
  elif not isinstance(image, Image.Image):
    raise ValueError(f'an image is a {type(image).__name__}; expected bytes, a PIL image or an array.')
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise ValueError(f'an image of {width} x {height} pixels is over the limit of {MAX_PIXELS:,} pixels.')
  if least:
    image.draft(None, (least, least))
  image.load()  # a PNG may have its EXIF after the pixels
  if (orientation := _orientation(image)) in TURNS:
    image = image.transpose(TURNS[orientation])  # exif_transpose writes the EXIF again, which may not be possible
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
    raise ValueError(
      f'an image is {image.dtype}{list(image.shape)}; expected uint8 or uint16 of [H, W] or [H, W, 1, 3 or 4].'
    )
  return Image.fromarray(image if image.dtype == np.uint8 else _eight_bits(image, 65_535))


def _from_deep(image: np.ndarray) -> Image.Image:
  """Scales a grey image of more than 8 bits, which Pillow's own conversion would clip to white."""
  if image.dtype.kind == 'f':
    return Image.fromarray(_eight_bits(image, 1.0 if image.max() <= 1 else 255.0))
  return Image.fromarray(_eight_bits(image, 65_535 if image.max() > 255 or image.dtype == np.uint16 else 255))


def _eight_bits(image: np.ndarray, white: float) -> np.ndarray:
  return np.clip(image.astype(np.float32) * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)


def crop(image: Image.Image, size: int, augment: Collection[str], rng: np.random.Generator | None) -> np.ndarray:
  """Crops a square from an RGB image and resizes it with antialiasing to uint8[size, size, 3].

  The square is central and as wide as the short side. With 'random_crop' it has 7/8 to 8/8 of that width and may be
  anywhere. 'flip' mirrors an image with probability 1/2. Without `rng`, as in evaluation, neither happens.
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


def open_image(image: Any, size: int, name: str) -> np.ndarray:
  """The central crop uint8[size, size, 3] of an image given as a path, bytes, PIL image or array.

  Raises FileNotFoundError for a missing file, and ValueError for an image that cannot be read: it is called by its path
  or else `name`.
  """
  if isinstance(image, (str, Path)):
    if not Path(image).is_file():
      raise FileNotFoundError(f'there is no image {image}.')
    name, image = str(image), Path(image).read_bytes()
  try:
    image = to_rgb(image)
  except Exception as e:  # the exceptions that Pillow raises for broken files have no common class
    raise ValueError(f'{name} is not an image that can be read: {" ".join(str(e).split())}') from e
  return crop(image, size, (), None)


def check_images(images: np.ndarray, size: int) -> None:
  """Raises ValueError unless the images are uint8[B, size, size, 3]."""
  if not isinstance(images, np.ndarray):
    raise ValueError(f'images are a {type(images).__name__}; expected uint8[B, {size}, {size}, 3].')
  if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
    raise ValueError(f'images are {images.dtype}{list(images.shape)}; expected uint8[B, {size}, {size}, 3].')
