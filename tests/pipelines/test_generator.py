"""What every generator shares, without a network."""

import itertools

import numpy as np
import pytest

from dalle_jax.data import bpe
from dalle_jax.pipelines.generator import Generator, plan_calls
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


def test_calls_sample_every_number_of_every_request_in_few_sizes():
  for count, n, most, shards in itertools.product((1, 2, 3, 5, 11), (1, 3, 16, 70), (1, 8, 64), (1, 4, 6, 8)):
    requests, numbers = plan_calls(count, n, most, shards)
    drawn = zip(np.repeat(requests, numbers.shape[2]), numbers.ravel(), strict=True)
    assert set(drawn) >= set(np.ndindex(count, n)) and requests.shape[1] % shards == 0
    assert requests.shape[1] == shards or numbers[0].size < most + numbers.shape[2] * shards
  drawn = lambda *arguments: plan_calls(*arguments)[1].size
  assert [drawn(count, 16, 64, 4) for count in (1, 2, 3, 4, 8)] == [16, 32, 64, 64, 128]
  assert drawn(1, 16, 64, 6) == 18 and drawn(3, 100, 64, 1) == 3 * 128
  for n, shards in itertools.product((1, 4, 16), (1, 4, 8, 64)):
    assert len({plan_calls(count, n, 64, shards)[1].shape[1:] for count in range(1, 200)}) <= 7
