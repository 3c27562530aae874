"""Properties of a retro-fitted DALL-E; each fault of the released StoryDALL-E violates one of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.functional import decoding
from dalle_jax.layers.basic import sinusoid
from dalle_jax.models import dalle, story_dalle
from dalle_jax.training import checkpoint, sharding
from tests import runs

B, T, N, I = 3, 4, 6, 16
TEXT = jax.random.randint(jax.random.key(0), (B, T, N), 0, 34)
IMAGE = jax.random.randint(jax.random.key(1), (B, T, I), 0, 16)
SOURCE = jax.random.randint(jax.random.key(2), (B, I), 0, 16)
FORMS = [
  dict(), dict(prompt=3, sentences='data', sentence_dim=5), dict(depth=4, retro=2, period=2, attention='row,column')
]  # fmt: skip
ROTARY = dict(image_positions='rotary', shift_tokens=True, reversible=True, heads=3, head_dim=12)  # as of DALLE-pytorch
FORMS.append(ROTARY)


@functools.cache
def built(**fields):
  """The model, of two layers unless `fields` say otherwise, random parameters, and sentence embeddings if needed."""
  model = story_dalle.build('test', **{'depth': 2, **fields})
  dim = fields.get('sentence_dim')
  sentences = jax.random.normal(jax.random.key(3), (B, T, dim)) if dim else None
  params = runs.parameters(model.init, TEXT, IMAGE, SOURCE, sentences)['params']
  return model, params, sentences


@functools.cache
def forward(**fields):
  """logits(text, image, source) as [B, T, ...]."""
  model, params, sentences = built(**fields)

  @jax.jit
  def logits(text, image, source):
    both = model.apply({'params': params}, text, image, source, sentences)
    return tuple(x.reshape(*text.shape[:2], *x.shape[1:]) for x in both)

  return lambda text=TEXT, image=IMAGE, source=SOURCE: logits(text, image, source)


def changed(a, b, axis=-1):
  return np.abs(np.asarray(a) - np.asarray(b)).max(axis) > 1e-4


def test_retrofitting_is_a_strict_merge_that_gives_the_pretrained_logits():
  """(Released: the cross-attention is no parameter at all.)"""
  base = dalle.build('test', depth=2)
  rows = TEXT.reshape(-1, N), IMAGE.reshape(-1, I)
  pretrained = {'dalle': runs.parameters(base.init, *rows)['params']}
  model, _, _ = built(story_encoder='')
  fresh = nn.unbox(jax.jit(model.init)(jax.random.key(5), TEXT, IMAGE, SOURCE)['params'])
  merged = checkpoint.strict_merge(fresh, pretrained, new='story/.*')
  kept = {k: v for k, v in sharding.flatten(merged).items() if k.startswith('dalle/')}
  assert set(kept) == set(sharding.flatten(pretrained))
  expected = jax.jit(base.apply)({'params': pretrained['dalle']}, *rows)
  for a, b in zip(jax.jit(model.apply)({'params': merged}, TEXT, IMAGE, SOURCE), expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)  # two programs may round differently
  context = jax.jit(lambda p: model.apply({'params': p}, TEXT, SOURCE, method='conditioning')[1])(merged)
  assert not context.out.any() and not context.out_bias.any()  # what is added is zero to the bit
  with pytest.raises(ValueError, match='missing story/cross'):
    checkpoint.strict_merge(fresh, pretrained)
  with pytest.raises(ValueError, match='unexpected dalle/odd'):
    checkpoint.strict_merge(fresh, {'dalle': {**pretrained['dalle'], 'odd': jnp.ones(2)}}, new='story/.*')


@pytest.mark.parametrize('fields', [{}, ROTARY], ids=str)
def test_the_source_is_no_bag_of_tokens(fields):
  logits, grid = forward(**fields), SOURCE.reshape(B, 4, 4)
  for other in (grid[:, ::-1], grid[:, :, ::-1]):  # its rows and its columns in another order
    assert changed(logits()[1], logits(source=other.reshape(B, I))[1]).mean() > 0.9


@pytest.mark.parametrize('fields', FORMS, ids=str)
def test_cached_logits_are_the_teacher_forced_ones(fields):
  """With a prompt, too: the first image token comes from position N + P. (Released: N - 1; source lost when cached.)"""
  model, params, sentences = built(**fields)
  expected = forward(**fields)()[1].reshape(B * T, I, -1)
  rows, image = TEXT.reshape(-1, N), IMAGE.reshape(-1, I)

  @jax.jit
  def cached():
    apply = story_dalle.sampler(model, params, TEXT, SOURCE, sentences)
    first, cache = apply(rows, image[:, :0], method='prefill')

    def step(cache, i):
      logits, cache = apply(image[:, i], i, cache, method='step')
      return cache, logits

    return first, jax.lax.scan(step, cache.extend(I - 1), jnp.arange(I - 1))[1]

  first, rest = cached()
  np.testing.assert_allclose(first, expected[:, 0], atol=2e-4)
  for i, logits in enumerate(rest):
    np.testing.assert_allclose(logits, expected[:, i + 1], atol=2e-4, err_msg=f'token {i + 1}')


@pytest.mark.parametrize('fields', FORMS, ids=str)
def test_the_source_reaches_every_image_token_of_its_own_story_and_no_text(fields):
  """(Released: every frame of a batch attends to a scrambled source; the "mega" variant to the text instead.)"""
  logits = forward(**fields)
  text, image = logits()
  other_text, other_image = logits(source=SOURCE.at[1].set((SOURCE[1] + 1) % 16))
  np.testing.assert_array_equal(text, other_text)
  moved = changed(image, other_image)
  assert moved[1].all() and not moved[[0, 2]].any()


def test_permuting_stories_permutes_outputs():
  order = np.array([2, 0, 1])
  for a, b in zip(forward()(), forward()(TEXT[order], IMAGE[order], SOURCE[order]), strict=True):
    np.testing.assert_allclose(a[order], b, atol=1e-4)


def test_the_story_token_depends_on_all_captions_and_their_order():
  """(Released: causal, without positions.)"""
  model, params, _ = built()
  look = jax.jit(lambda text: model.apply({'params': params}, text, SOURCE, method='conditioning')[0])
  token = lambda text: look(text).reshape(B, T, -1)
  third = TEXT.at[0, 2].set((TEXT[0, 2] + 1) % 34)
  assert changed(token(TEXT), token(third))[0].all() and not changed(token(TEXT), token(third))[1:].any()
  swapped = token(TEXT[:, [0, 2, 1, 3]])
  assert changed(token(TEXT), swapped).all()
  np.testing.assert_allclose(sinusoid(jnp.arange(5), 8)[3, [0, 4]], [np.sin(3), np.cos(3)], atol=1e-6)
  first = forward()(text=third)
  assert changed(first[1], forward()()[1])[0, 0].all()  # caption 3 is felt in every image token of frame 1


def test_every_new_parameter_gets_a_gradient():
  model, params, sentences = built(prompt=3, sentences='data', sentence_dim=5)
  loss = lambda p: sum(jnp.square(x).sum() for x in model.apply({'params': p}, TEXT, IMAGE, SOURCE, sentences))
  grads = sharding.flatten(jax.jit(jax.grad(loss))(params)['story'])
  dead = {k for k, g in grads.items() if np.abs(g).max() < 1e-6}
  assert {k for k in dead if not k.endswith(('key_bias', 'key/bias'))} == set()  # it shifts all scores of a query alike


def test_sampling_is_the_model_and_guidance_keeps_the_source():
  model, params, _ = built()
  sample = jax.jit(
    lambda source, sampling: decoding.sample(
      story_dalle.sampler(model, params, TEXT, source, None),
      TEXT.reshape(-1, N),
      jnp.zeros((B * T, 0), jnp.int32),
      jax.random.split(jax.random.key(7), B * T * 2),
      empty=model.dalle.padding,
      length=I,
      n=2,
      sampling=sampling,
    ),
    static_argnums=1,
  )
  greedy = sample(SOURCE, decoding.Sampling(temperature=0.0))
  np.testing.assert_array_equal(greedy[::2], greedy[1::2])
  tokens = greedy[::2].reshape(B, T, I)
  np.testing.assert_array_equal(forward()(image=tokens)[1].argmax(-1), tokens)
  guided = sample(SOURCE, decoding.Sampling(temperature=0.0, guidance=1.0 + 1e-6))
  np.testing.assert_array_equal(guided, greedy)
  other = sample((SOURCE + 1) % 16, decoding.Sampling(temperature=0.0)).reshape(B, T, 2, I)
  assert (other[:, :, 0, 0] != tokens[..., 0]).any() and (other[:, :, 0, -1] != tokens[..., -1]).any()


def test_prompt_dropout_acts_only_in_training():
  model, params, sentences = built(prompt=3, sentences='data', sentence_dim=5)
  look = jax.jit(lambda rng: model.apply({'params': params}, TEXT, SOURCE, sentences, rng, method='conditioning')[0])
  np.testing.assert_array_equal(look(None), look(None))
  assert changed(look(jax.random.key(0)), look(jax.random.key(1)))[:, :3].any()


@pytest.mark.parametrize('head', ['linear', 'tied', 'norm'])
def test_a_grown_vocabulary_leaves_old_words_as_they_were(head):
  old, new = dalle.build('test', head=head), dalle.build('test', text_vocab=43, head=head)
  rows = TEXT.reshape(-1, N), IMAGE.reshape(-1, I)
  params = runs.parameters(old.init, *rows)['params']
  grown = dalle.adopt(new, {'dalle': params}, {'tokenizer': {'vocab_size': 34}}, jax.random.key(8))['dalle']
  assert grown['text_embed'].shape == (43, 16)
  text = rows[0].at[:, 4:].set(jnp.arange(38, 40))  # two paddings
  before, image = jax.jit(old.apply)({'params': params}, text, rows[1])
  after, same = jax.jit(new.apply)({'params': grown}, jnp.where(text >= 34, text + 3, text), rows[1])
  np.testing.assert_allclose(image, same, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(before, np.delete(after, [34, 35, 36], -1), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match='has 50 text tokens, this one only 37'):
    dalle.adopt(new, {'dalle': params}, {'tokenizer': {'vocab_size': 50}}, jax.random.key(8))
  with pytest.raises(ValueError, match=r'init\.path is a run of vqgan; expected a run with a DALL-E'):
    dalle.adopt(new, {'vqgan': params}, {'tokenizer': {'vocab_size': 0}}, jax.random.key(8))


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(retro=3), 'model.retro 3 does not divide the 4 layers'),
    (dict(retro=-1), 'model.retro -1 does not divide the 4 layers'),
    (dict(prompt=-1), 'StoryDALLE.prompt is -1; expected 0 or more'),
    (dict(retro=4), '1 layers with cross-attention do not fit 4 steps.*model.period'),
    (dict(frames=3), 'a story has 4 frames after the source, the model takes at most 3'),
    (dict(sentences='bert'), "model.sentences 'bert' is unknown; expected own, clip or data"),
    (dict(retros=3), 'DALLE has no field retros'),
  ],
)
def test_what_does_not_fit_is_one_line(fields, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(story_dalle.build('test', **fields).init, jax.random.key(5), TEXT, IMAGE, SOURCE)
