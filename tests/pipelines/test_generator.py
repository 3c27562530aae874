"""What every generator shares, without a network."""

import pytest

from dalle_jax.data import bpe
from dalle_jax.pipelines.generator import Generator
from dalle_jax.training.checkpoint import Run

BPE = bpe.train(['a red heart'] * 3, 260)


@pytest.mark.parametrize(
  ('special', 'capacity'),
  [({}, 6), ({'start': 0, 'end': 1}, 4), ({'start': 0, 'end': 1, 'pad': 1}, 4), ({'end': 1, 'pad': 1}, 5)],
)
def test_a_prompt_that_is_cut_gives_a_warning(special, capacity, caplog):
  config = {'data': {'image_size': 8}, 'tokenizer': {'length': 6, **special}}
  generator = Generator(Run(config, {}, BPE.to_json(), 0, ''), {})
  for count in (0, 1, capacity):
    generator._text('xyzxyzxyz'[: max(0, count - 1)])  # and the space before it
  assert not caplog.records
  assert len(BPE.encode('xyzxyzxyz'[:capacity])) == capacity + 1
  generator._text('xyzxyzxyz'[:capacity])
  assert f'has {capacity + 1} tokens; the model reads the first {capacity}.' in caplog.text
