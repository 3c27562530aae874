import numpy as np
import pytest

from dalle_jax.pipelines.grids import caption_grid


def test_rows_hold_their_pictures():
  red, blue = (np.broadcast_to(np.array(c, np.uint8), (48, 48, 3)) for c in ((255, 0, 0), (0, 0, 255)))
  grid = np.asarray(caption_grid([('one', [red, blue, red, red]), ('a long caption ' * 20, [blue])], ['true']))
  assert (grid == [255, 0, 0]).all(-1).sum() == 3 * 96 * 96 and (grid == [0, 0, 255]).all(-1).sum() == 2 * 96 * 96
  with pytest.raises(ValueError, match='no images to put into a grid'):
    caption_grid([('one', [])])
