"""Imported public checkpoints give the same numbers as their original code.

  pytest tests/convert/test_parity.py --parity-dir DIR
runs on other folders instead: DIR itself, or all folders in it whose names begin with that of a kind. The numbers for
`inception` come from a network written after the original, with all widths divided by 16. The released StoryDALL-E lays
out the keys and values of its sources wrongly for more than one row; the comparison does the same with ours.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.convert import parity

HERE = Path(__file__).parent / 'fixtures'
TOLERANCE = 1e-4  # relative L2


def folders(config) -> list:
  given = config.getoption('--parity-dir')
  root = Path(given).expanduser() if given else HERE
  places = [root] if (root / 'expected.npz').is_file() else sorted(p.parent for p in root.glob('*/expected.npz'))
  cases = [(kind, place) for place in places for kind in parity.KINDS if place.name.startswith(kind)]
  return [pytest.param(kind, place, id=place.name) for kind, place in cases]


def pytest_generate_tests(metafunc):
  if 'kind' in metafunc.fixturenames:
    metafunc.parametrize('kind, folder', folders(metafunc.config))


def test_every_array_is_that_of_the_original(kind, folder):
  with np.load(folder / 'expected.npz') as file:
    arrays = dict(file)
  left_out = parity.LEFT_OUT.get(kind, {})
  found = parity.KINDS[kind](folder, arrays)
  expected = {k: v for k, v in arrays.items() if k.startswith('out_') and k not in left_out}
  assert set(expected) <= set(found)  # the fixtures here lack some large arrays
  for name, theirs in expected.items():
    ours = np.asarray(found[name])
    assert ours.shape == theirs.shape, name
    if theirs.dtype.kind in 'iub':
      assert (ours == theirs).all(), f'{name}: {(ours != theirs).mean():.1%} differ'
    else:
      error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)
      assert error <= TOLERANCE, f'{name}: relative error {error:.2e}'


def test_every_kind_has_a_folder():
  assert sorted(p.name for p in HERE.iterdir()) == sorted(parity.KINDS)
