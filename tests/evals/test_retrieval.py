"""Ranks by hand, with ties and captions that several records share."""

import numpy as np
import pytest

from dalle_jax.evals.retrieval import ranks

SIMILARITY = np.array(
  [
    [0.9, 0.1, 0.2, 0.3],  # the right one first
    [0.5, 0.4, 0.3, 0.2],  # one wrong one ahead
    [0.5, 0.5, 0.5, 0.5],  # all tie: the three wrong ones count as ahead
    [0.1, 0.6, 0.6, 0.6],  # two wrong ones tie with the right one
  ]
)


def test_by_hand():
  np.testing.assert_array_equal(ranks(SIMILARITY, np.eye(4, dtype=bool)), [1, 2, 4, 3])
  np.testing.assert_array_equal(ranks(SIMILARITY.T, np.eye(4, dtype=bool)), [1, 3, 2, 1])


def test_records_of_one_caption_are_right_for_each_other():
  captions = np.array([0, 1, 0, 1])
  np.testing.assert_array_equal(ranks(SIMILARITY, captions[:, None] == captions), [1, 2, 3, 2])


def test_a_query_without_a_correct_item_is_refused():
  with pytest.raises(ValueError, match='every query needs a correct item'):
    ranks(SIMILARITY, np.eye(4, dtype=bool) & False)
