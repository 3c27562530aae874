"""Imported public checkpoints give the numbers that their own code gives: `pytest tests/convert/test_parity.py`.

Those of `inception` are by a net that was written after its code, every width divided by 16.

`--parity-dir DIR` runs the same comparisons on other folders: every one in DIR (or DIR itself) whose name begins with
that of a kind. The released StoryDALL-E lays keys and values of its sources out wrongly for more than one row; the
comparison lays ours out so, too.
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
  assert set(expected) <= set(found)  # some large arrays are not among the fixtures here, to keep them small
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
