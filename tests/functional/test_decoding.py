"""Filters against their definitions; the scan against a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dalle_jax.functional import decoding
from dalle_jax.functional.decoding import Sampling, filter_logits

V = 7


def kept(logits, **kwargs):
  return np.asarray(filter_logits(jnp.asarray(logits)[None], **kwargs)[0] > -1e29)


def test_top_k_and_top_p():
  p = np.array([0.4, 0.05, 0.3, 0.15, 0.1])
  assert kept(np.log(p), top_k=2).tolist() == [True, False, True, False, False]
  assert kept(np.log(p), top_k=9).all() and kept(np.log(p)).all()
  assert kept(np.log(p), top_p=0.65).tolist() == [True, False, True, False, False]
  assert kept(np.log(p), top_p=0.75).tolist() == [True, False, True, True, False]
  assert kept(np.log(p), top_p=0.01).tolist() == [True, False, False, False, False]
  assert kept(np.log(p), top_k=3, top_p=0.8).tolist() == [True, False, True, False, False]  # of those that are left


class Toy(struct.PyTreeNode):
  """The cache of `toy_step`: a total of each row, and how many tokens there is room for."""

  total: jax.Array
  room: jax.Array

  def extend(self, n):
    return Toy(self.total, jnp.pad(self.room, (0, n)))


def toy_step(token, index, cache):
  """Logits that depend on the token, its index and all before it."""
  total = cache.total + (token + 1.0) * (index + 1)
  return jnp.sin(total[:, None] * (jnp.arange(V) + 1)) * 3, cache.replace(total=total)


def generate(sampling, start=0, length=9, rows=3, segments=4, keys=None):
  count = 2 * rows if sampling.guided else rows
  first = jnp.cos(jnp.arange(count)[:, None] * jnp.arange(V))
  keys = jax.random.split(jax.random.key(5), rows) if keys is None else keys
  cache, told = Toy(jnp.arange(count) * 1.0, jnp.zeros(start)), dict(start=start, length=length, segments=segments)
  return np.asarray(decoding.generate(toy_step, first, cache, keys, sampling=sampling, **told))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('start', [0, 4, 8])
def test_the_scan_is_the_loop(start, temperature):
  """Greedily, or with a key of its own for every token of every row."""
  logits, cache = jnp.cos(jnp.arange(3)[:, None] * jnp.arange(V)), Toy(jnp.arange(3) * 1.0, jnp.zeros(start))
  keys, expected = jax.random.split(jax.random.key(5), 3), []
  for index in range(start, 9):
    drawn = [jax.random.categorical(jax.random.fold_in(k, index), x) for k, x in zip(keys, logits, strict=True)]
    token = jnp.stack(drawn) if temperature else logits.argmax(-1)
    expected.append(token)
    logits, cache = toy_step(token, index, cache)
  np.testing.assert_array_equal(generate(Sampling(temperature), start), np.stack(expected, 1))


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(0.7, top_k=3, top_p=0.9, guidance=2.0)])
def test_segments_change_nothing_and_a_row_does_not_depend_on_its_batch(sampling):
  base = generate(sampling)
  assert base.shape == (3, 9) and base.dtype == np.int32 and base.min() >= 0 and base.max() < V
  for segments in (1, 3, 20):
    np.testing.assert_array_equal(generate(sampling, segments=segments), base)
  if not sampling.guided:  # the toy's start depends on the row, so the first one stays
    keys = jax.random.split(jax.random.key(5), 3)[:1]
    np.testing.assert_array_equal(generate(sampling, rows=1, keys=keys), base[:1])


def test_every_segment_has_room_for_its_tokens_and_no_more():
  seen = []

  def step(token, index, cache):
    seen.append(len(cache.room))
    return jnp.where(index < len(cache.room), 1.0, -1.0) * jnp.eye(V)[1][None], cache

  keys, cache = jax.random.split(jax.random.key(0), 1), Toy(jnp.zeros(1), jnp.zeros(0))
  draw = lambda **kwargs: decoding.generate(
    step, jnp.eye(V)[1][None], cache, keys, start=0, sampling=Sampling(0.0), **kwargs
  )
  assert (draw(length=10, segments=4) == 1).all() and sorted(set(seen)) == [2, 4, 6, 9]
  for length, rooms in ((65, [64]), (66, [32, 65]), (1000, [249, 499, 749, 999])):
    seen.clear()
    assert (draw(length=length) == 1).all() and sorted(set(seen)) == rooms


def test_sampling_follows_the_probabilities():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
  keys = jax.random.split(jax.random.key(0), 4000)
  tokens = decoding.choose(jnp.repeat(logits, 4000, 0), keys, Sampling())
  np.testing.assert_allclose(np.bincount(tokens) / 4000, [0.5, 0.3, 0.2], atol=0.03)
  cold = decoding.choose(jnp.repeat(logits, 4000, 0), keys, Sampling(temperature=0.5))
  np.testing.assert_allclose(np.bincount(cold) / 4000, np.array([0.25, 0.09, 0.04]) / 0.38, atol=0.03)


def test_the_first_of_the_largest_is_taken_as_by_argmax():
  logits = jax.random.randint(jax.random.key(0), (64, 50), 0, 9).astype(jnp.float32)
  np.testing.assert_array_equal(decoding.first_largest(logits), logits.argmax(-1))
  keys = jax.random.split(jax.random.key(1), 64)
  drawn = jax.vmap(jax.random.categorical)(keys, logits)
  np.testing.assert_array_equal(decoding.choose(logits, keys, Sampling()), drawn)


def test_captions_are_completed_up_to_their_padding():
  padding, words = jnp.array([10, 11, 12, 13, 14]), 10  # an id of its own for each position

  def next_logits(text, t):
    # A caption counts on from its last token, and ends behind 4; paddings of other positions are likely, and wrong.
    before = text[:, t - 1]
    wanted = jnp.where(before == 4, padding[t], before + 1)
    return 5.0 * jax.nn.one_hot(wanted, 15) + 9.0 * jax.nn.one_hot((padding[t] - 9) % 5 + 10, 15)

  text = jnp.array([[2, 9, 9, 9, 9], [0, 1, 9, 9, 9], [7, 7, 7, 7, 7]])
  keys = jax.random.split(jax.random.key(0), 3)
  greedy = lambda lengths, end=-1: decoding.complete_text(
    next_logits, text, jnp.array(lengths), padding, words, keys, Sampling(temperature=0.0), end
  ).tolist()
  assert greedy([1, 2, 5]) == [[2, 3, 4, 13, 14], [0, 1, 2, 3, 4], [7, 7, 7, 7, 7]]
  assert greedy([1, 2, 5], end=3) == [[2, 3, 12, 13, 14], [0, 1, 2, 3, 14], [7, 7, 7, 7, 7]]


def test_one_program_serves_all_numbers_of_the_options_in_use():
  logits, keys = jax.random.normal(jax.random.key(0), (6, V)), jax.random.split(jax.random.key(1), 3)
  choose = jax.jit(lambda keys, sampling: decoding.choose(logits if sampling.guided else logits[:3], keys, sampling))
  every = [Sampling(t, 0, p, g) for t in (0.5, 1.0, 2) for p in (0.5, 0.9) for g in (0.0, 3.0)]
  for sampling in every:
    expected = decoding.choose(logits, keys, sampling)
    np.testing.assert_array_equal(choose(keys, sampling), expected)
  assert choose._cache_size() == 1
  assert len({choose(keys, sampling).tobytes() for sampling in every}) > 1
  for i, off in enumerate((Sampling(0.0), Sampling(0.5), Sampling(0.5, top_k=2), Sampling(0.5, guidance=2.0)), 2):
    np.testing.assert_array_equal(choose(keys, off), decoding.choose(logits if off.guided else logits[:3], keys, off))
    assert choose._cache_size() == i
  found = jax.tree.unflatten(jax.tree.structure(every[0]), jax.tree.leaves(every[0]))
  assert found == every[0] and hash(found) == hash(every[0])


def test_guidance():
  cond, uncond = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
  np.testing.assert_allclose(decoding.guide(jnp.concatenate([cond, uncond]), 3.0), [[3.0, -2.0]])
  np.testing.assert_allclose(decoding.guide(jnp.concatenate([cond, uncond]), 0.0), uncond)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(temperature=-1.0), r'temperature -1.0 is negative'),
    (dict(top_k=-1), 'top_k -1 is negative'),
    (dict(top_p=0.0), r'top_p 0.0 is not in \[1e-09, 1\]'),
    (dict(top_p=1e-46), r'top_p 1e-46 is not in \[1e-09, 1\]'),
    (dict(temperature=1e-38), 'temperature 1e-38 is too small'),
    (dict(temperature=float('nan')), 'temperature is nan; expected a finite number'),
    (dict(guidance=float('inf')), 'guidance is inf; expected a finite number'),
    (dict(top_p=float('nan')), 'top_p is nan; expected a finite number'),
    (dict(temperature='1'), "temperature is '1'; expected a finite number"),
    (dict(guidance=None), 'guidance is None; expected a finite number'),
    (dict(top_k=3.5), 'top_k is 3.5; expected a whole number'),
  ],
)
def test_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**fields)
