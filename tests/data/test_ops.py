"""Pictures of every kind become upright 8-bit RGB; crops and resizes do what they say."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from dalle_jax.data import ops

COLORS = np.array([[[250, 10, 20], [10, 240, 30]], [[20, 30, 230], [200, 200, 40]]], np.uint8)
PICTURE = COLORS.repeat(16, 0).repeat(24, 1)  # 32 high, 48 wide, a colour a quarter


def stored(image, kind='png', **kwargs):
  file = io.BytesIO()
  image.save(file, kind, **kwargs)
  return file.getvalue()


def close(actual, expected, tolerance=4):
  assert actual.dtype == np.uint8 and actual.shape == expected.shape
  inner = (slice(4, 12), slice(4, 20))  # away from the edges that JPEG smears
  assert np.abs(actual[inner].astype(int) - expected[inner]).max() <= tolerance


@pytest.mark.parametrize('kind, tolerance', [('png', 0), ('jpeg', 6), ('webp', 8), ('bmp', 0)])
def test_files_arrays_and_pil_images(kind, tolerance):
  options = dict(quality=95) if kind in ('jpeg', 'webp') else {}
  close(ops.decode(stored(Image.fromarray(PICTURE), kind, **options)), PICTURE, tolerance)
  np.testing.assert_array_equal(ops.decode(PICTURE), PICTURE)
  np.testing.assert_array_equal(ops.decode(Image.fromarray(PICTURE)), PICTURE)


def test_transparency_is_composited_on_white():
  alpha = np.full((32, 48), 255, np.uint8)
  alpha[:16] = 0
  image = ops.decode(stored(Image.fromarray(np.dstack([PICTURE, alpha]))))
  assert (image[:16] == 255).all()
  np.testing.assert_array_equal(image[16:], PICTURE[16:])
  half = ops.decode(np.dstack([np.zeros_like(PICTURE), np.full((32, 48), 128, np.uint8)]))
  assert abs(int(half[0, 0, 0]) - 127) <= 1


def test_palette_pictures_with_and_without_transparency():
  palette = Image.fromarray(PICTURE).convert('P', palette=Image.Palette.ADAPTIVE, colors=8)
  close(ops.decode(stored(palette)), PICTURE)
  index = palette.getpixel((0, 0))
  image = ops.decode(stored(palette, transparency=index))
  assert (image[2, 2] == 255).all()
  close(image[16:], PICTURE[16:])


def test_grey_pictures():
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
  for image in (stored(Image.fromarray(grey)), grey, grey[..., None]):
    np.testing.assert_array_equal(ops.decode(image), grey[..., None].repeat(3, -1))
  both = np.dstack([grey, np.zeros_like(grey)])
  assert (ops.decode(stored(Image.fromarray(both, 'LA'))) == 255).all()
  assert ops.decode(stored(Image.fromarray(grey > 99)))[0, 0, 0] == 0  # one bit


def test_sixteen_bits_are_scaled_not_clipped():
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
  deep = grey.astype(np.uint16) * 257
  for image in (stored(Image.fromarray(deep)), stored(Image.fromarray(deep), 'tiff'), deep):
    np.testing.assert_array_equal(ops.decode(image)[..., 0], grey)
  np.testing.assert_array_equal(ops.decode(stored(Image.fromarray(deep.astype(np.int32)), 'tiff'))[..., 0], grey)
  np.testing.assert_array_equal(ops.decode(stored(Image.fromarray(grey / np.float32(255)), 'tiff'))[..., 0], grey)
  np.testing.assert_array_equal(ops.decode(PICTURE.astype(np.uint16) * 257), PICTURE)


def test_cmyk_and_exif_orientation():
  close(ops.decode(stored(Image.fromarray(PICTURE).convert('CMYK'), 'jpeg', quality=95)), PICTURE, 6)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise
  turned = stored(Image.fromarray(np.rot90(PICTURE).copy()), 'jpeg', quality=95, exif=exif)
  close(ops.decode(turned), PICTURE, 6)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_even_if_their_exif_cannot_be_written_again(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  good = Image.open(io.BytesIO(stored(Image.fromarray(PICTURE), 'png', exif=exif)))
  tags = struct.pack('<HHHIHH', 2, 0x112, 3, 1, orientation, 0) + struct.pack('<HHI4s', 0x128, 2, 2, b'2\0\0\0')
  odd = b'II*\0' + struct.pack('<I', 8) + tags + bytes(4)  # a unit of resolution that is text
  image = ops.decode(stored(Image.fromarray(PICTURE), 'png', exif=odd))
  np.testing.assert_array_equal(image, ImageOps.exif_transpose(good))


@pytest.mark.parametrize('kind', ['png', 'webp', 'jpeg'])
def test_exif_that_cannot_be_read_turns_nothing(kind):
  image = ops.decode(stored(Image.fromarray(PICTURE), kind, exif=b'this is not a TIFF'))
  close(image, PICTURE, 24)


def test_the_first_frame_of_an_animation():
  frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (10, 200)]
  for kind in ('gif', 'webp', 'png'):
    options = dict(lossless=True) if kind == 'webp' else {}
    image = ops.decode(stored(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert abs(int(image[0, 0, 0]) - 10) <= 1


@pytest.mark.parametrize(
  'bad',
  [
    b'',
    b'not a picture',
    stored(Image.fromarray(PICTURE), 'jpeg')[:200],
    stored(Image.fromarray(PICTURE))[:90],
    'a path',
    np.zeros((2, 2, 2), np.uint8),
    np.zeros((4, 4, 3)),
    np.zeros((0, 4, 3), np.uint8),
  ],
)
def test_what_is_no_picture_raises(bad):
  with pytest.raises((ValueError, OSError, SyntaxError)):
    ops.decode(bad)


def test_a_picture_that_cannot_be_opened_is_named(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'no picture')
  for image, name in ((tmp_path / 'a.png', f'{tmp_path}/a.png'), (b'no picture', 'init_image')):
    with pytest.raises(ValueError) as e:
      ops.open_image(image, 8, 'init_image')
    assert str(e.value) == f'{name} is not an image that can be read: cannot identify the image format'


def test_a_huge_picture_is_refused_before_it_is_decoded(recwarn):
  huge = stored(Image.new('1', (10_000, 9_000)))
  assert len(huge) < 50_000
  with pytest.raises(ValueError, match='10000 x 9000'):
    ops.decode(huge)
  assert not recwarn.list


def test_centre_crop_is_exact_without_a_resize():
  crop = ops.crop(Image.fromarray(PICTURE), 32, (), None)
  np.testing.assert_array_equal(crop, PICTURE[:, 8:40])
  np.testing.assert_array_equal(
    ops.crop(Image.fromarray(PICTURE.swapaxes(0, 1).copy()), 32, (), None).shape, (32, 32, 3)
  )


def test_resize_antialiases_down_and_works_up():
  checks = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * 255
  small = ops.crop(Image.fromarray(checks.astype(np.uint8)), 16, (), None)
  assert np.abs(small.astype(int) - 127).max() < 16  # grey, not stripes
  assert ops.crop(Image.fromarray(PICTURE), 100, (), None).shape == (100, 100, 3)
  assert ops.crop(Image.new('RGB', (1, 500), 'red'), 8, (), None).tolist() == [[[255, 0, 0]] * 8] * 8


def test_a_jpeg_decoded_small_gives_nearly_the_same_picture():
  y, x = np.mgrid[:512, :768]
  smooth = np.dstack([x / 3, y / 2, (x + y) / 5]).astype(np.uint8)
  data = stored(Image.fromarray(smooth), 'jpeg', quality=95)
  assert ops.to_rgb(data, least=128).size < (768, 512) and min(ops.to_rgb(data, least=128).size) >= 128
  whole, quick = (ops.crop(ops.to_rgb(data, least=n), 64, (), None).astype(int) for n in (0, 128))
  assert np.abs(whole - quick).max() <= 6


def test_random_crops_and_flips_come_from_the_generator():
  image = Image.fromarray(PICTURE)
  crops = [ops.crop(image, 16, {'random_crop'}, np.random.default_rng(s)) for s in range(8)]
  assert len({c.tobytes() for c in crops}) > 4
  np.testing.assert_array_equal(crops[3], ops.crop(image, 16, {'random_crop'}, np.random.default_rng(3)))
  plain = ops.crop(image, 16, {'flip'}, None)
  flips = [ops.crop(image, 16, {'flip'}, np.random.default_rng(s)) for s in range(40)]
  assert {f.tobytes() for f in flips} == {plain.tobytes(), plain[:, ::-1].tobytes()}
  assert ops.parse_augment(' random_crop, flip') == {'random_crop', 'flip'} and not ops.parse_augment('')
