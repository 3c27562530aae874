"""Scores by hand, with classes that are absent."""

import numpy as np
import pytest

from dalle_jax.evals import characters

#                        A  B  C  D   D is in no frame
TRUE = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], bool)
FOUND = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]], bool)


def test_by_hand():
  """A: 3 hits. B: 1 hit, 1 miss, 1 false alarm. C: no frame has it, one is said to. D: absent, left out."""
  found = characters.scores(FOUND, TRUE, 'ABCD')
  assert found['f1_micro'] == pytest.approx(2 * 4 / (6 + 5))
  assert found['f1_macro'] == pytest.approx((1 + 0.5 + 0) / 3)
  assert found['frame_accuracy'] == 0.5
  assert found['f1'] == {'A': 1.0, 'B': 0.5, 'C': 0.0, 'D': None}
  np.testing.assert_array_equal(characters.f1_by_class(FOUND, TRUE), [1, 0.5, 0, np.nan])


def test_perfect_and_empty():
  assert characters.scores(TRUE, TRUE) == {'f1_micro': 1.0, 'f1_macro': 1.0, 'frame_accuracy': 1.0}
  none = np.zeros_like(TRUE)
  assert characters.scores(none, none) == {'f1_micro': 1.0, 'f1_macro': 1.0, 'frame_accuracy': 1.0}
  assert characters.scores(none, TRUE) == {'f1_micro': 0.0, 'f1_macro': 0.0, 'frame_accuracy': 0.0}


class Fake:
  """A classifier of two labels: red, and green, over 100."""

  kind, run = 'classifier', 'runs/fake'
  model = type('model', (), {'labels': 2})

  def labels(self, images):
    return images[:, 0, 0, :2] > 100


def test_tally_adds_batches():
  images = np.zeros((4, 2, 2, 3), np.uint8)
  images[[0, 1, 3], ..., 0] = 200
  true = np.array([[1, 0], [1, 0], [0, 0], [1, 1]], bool)
  tally = characters.Tally(Fake(), ('red', 'green'))
  rows = tally.add(true[:1], {'drawn': images[:1], 'true': images[:1]})
  rows += tally.add(true[1:], {'drawn': images[1:] * 0, 'true': images[1:]})
  assert rows[3] == {'labels': ['red', 'green'], 'labels_drawn': [], 'labels_true': ['red']}
  report = tally.report()
  assert report['characters_true'] == characters.scores(images[:, 0, 0, :2] > 100, true, ('red', 'green'))
  assert report['characters_true']['frame_accuracy'] == 0.75 and report['characters_drawn']['frame_accuracy'] == 0.5


def test_errors():
  with pytest.raises(ValueError, match=r'labels are bool\[4, 4\] and bool\[4, 3\]; expected bool\[N, C\] for both'):
    characters.scores(FOUND, TRUE[:, :3])
  with pytest.raises(ValueError, match='with N of 1 or more'):
    characters.scores(FOUND[:0], TRUE[:0])
  with pytest.raises(ValueError, match='labels are float64'):
    characters.f1_by_class(FOUND * 1.0, TRUE)
  with pytest.raises(ValueError, match='runs/fake has 2 labels and the data 3; give a classifier'):
    characters.Tally(Fake(), 'abc')
