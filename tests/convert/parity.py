"""Computes the outputs of our modules for the inputs of a parity folder, under the names in its expected.npz.

A folder has a public checkpoint, inputs (in_*) and the outputs of the original code (out_*), NCHW as in PyTorch.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.convert import files, torch_file
from dalle_jax.convert.__main__ import read
from dalle_jax.convert.sources import lpips as lpips_source
from dalle_jax.convert.sources.clip import MEAN, STD
from dalle_jax.data.bpe import text_encoder
from dalle_jax.functional import decoding, diffusion, gan, losses
from dalle_jax.functional.pixels import to_float
from dalle_jax.layers.cross import CrossAttention
from dalle_jax.layers.patterns import Pattern
from dalle_jax.models import (
  clip,
  dalle,
  dalle_mini,
  decode_params,
  discrete_vae,
  dvae,
  inception,
  lpips,
  patchgan,
  prior,
  roberta,
  story_dalle,
  unclip,
  upsampler,
  variants,
  vqgan,
)  # fmt: skip

LEFT_OUT = {  # kind -> arrays that are not compared -> reason
  'dalle_pytorch': {
    **dict.fromkeys(
      ['out_s2_sparse_greedy_cached', 'out_s4_shared_greedy_cached'], 'their sparse layers share one entry of the cache'
    ),
    **dict.fromkeys(
      [f'out_{name}_cond3_{how}' for name in ('s1_full', 's3_stable') for how in ('cache', 'nocache')],
      'their guidance acts on the first code only',
    ),
  },
  'storydalle': {
    'out_np_nocond_greedy_cached': 'their cache reads the first code at another position than in training',
    'out_np_cond_greedy_cached': 'the same, and ignores the source from the second code on',
    'out_p_nocond_greedy_cached': 'the same, and forgets the prompt',
    'out_p_cond_greedy_cached': 'all of these',
  },
}
nhwc = lambda x: jnp.asarray(x).transpose(0, 2, 3, 1)
nchw = lambda x: np.asarray(x).transpose(0, 3, 1, 2)


@functools.cache
def compiled(module, method):
  return jax.jit(lambda params, *args: module.apply({'params': params}, *args, method=method))


def applied(module, params, *args, method=None):
  return compiled(module, method)(params, *map(jnp.asarray, args))


def taming(folder, arrays, source='taming'):
  run = read(source, folder)
  config, params = run.config, run.network('vqgan')
  model, image = vqgan.build(**config['model']), nhwc(arrays['in_image'])
  gumbel = model.quantizer == 'gumbel'

  def forward(params, image):
    z = model.apply({'params': params}, image, method=lambda m, x: m.encoder(x))
    return z, model.apply({'params': params}, image)

  encoded, out = jax.jit(forward)(params, image)
  q = out.quantized
  decode = lambda codes: nchw(applied(model, params, codes, method='decode_codes'))
  found = {'out_encoder': nchw(encoded), 'out_prequant': nchw(q.inputs), 'out_codes': q.codes}
  found |= {'out_quant': nchw(q.vectors), 'out_recon': nchw(out.recon), 'out_decoded_codes': decode(arrays['in_codes'])}
  loss = q.losses['commitment'] + 0.25 * q.losses.get('codebook', 0.0) if not gumbel else 0.0
  if gumbel:
    kernel, bias, table = (params['quantize'][k] for k in ('proj', 'proj', 'embedding'))
    logits = jnp.einsum('bhwd,dk->bhwk', q.inputs, kernel['kernel'][0, 0]) + bias['bias']
    noisy = (logits + nhwc(arrays['in_gumbel'])).argmax(-1)
    loss = config['loss']['kl_weight'] * q.losses['kl']
    found |= {'out_proj_logits': nchw(logits), 'out_codes_gumbel': noisy, 'out_quant_gumbel': nchw(table[noisy])}
  found['out_kl_loss' if gumbel else 'out_codebook_loss'] = loss
  judge = patchgan.build(config['loss']['disc_variant'], **config['loss']['disc'])
  logits = lambda x: judge.apply({'params': run.network('discriminator')}, x)
  near, seen = run.frozen['lpips'], lpips.build(**run.frozen['lpips'].config['model'])
  distance = lambda x: seen.apply({'params': near.network('lpips')}, x, image)
  nll = lambda x, far: jnp.abs(x - image).mean() + config['loss']['lpips_weight'] * far.mean()
  fake, real, far = jax.jit(lambda x: (logits(x), logits(image), distance(x)))(out.recon)

  def head(kernel):
    variables = {'params': {'conv_out': {**params['conv_out'], 'kernel': kernel}}}
    return model.apply(variables, out.features, method='to_pixels')

  fool = lambda x: gan.hinge_generator(logits(x))
  weight = jax.jit(lambda kernel: gan.adaptive_weight(head, kernel, lambda x: nll(x, distance(x)), fool))(
    params['conv_out']['kernel']
  )
  weight = weight * config['loss']['disc_weight']
  found |= {
    'out_disc_logits': fake[:, None],
    'out_disc_logits_real': real[:, None],
    'out_nll_loss': nll(out.recon, far),
  }
  found |= {'out_lpips': far[:, None, None, None], 'out_g_loss': -fake.mean(), 'out_d_weight': weight}
  described = files.config(next(folder.glob('*.yaml')))['model']['params']['lossconfig']['params']
  found['out_total_loss'] = nll(out.recon, far) - weight * fake.mean() + described.get('codebook_weight', 1.0) * loss
  found['out_disc_loss'] = gan.hinge_discriminator(real, fake)
  return found


def image_tokens(run, image, codes):
  """Returns prequant, codes and reconstruction of the VQGAN of a run, and a function that decodes other codes."""
  frozen = run.frozen['vqgan']
  model, params = vqgan.build(**frozen.config['model']), frozen.network('vqgan')
  out = applied(model, params, nhwc(image))
  grid = model.grid(image.shape[-1])
  pictures = lambda x: nchw(applied(model, params, np.asarray(x).reshape(-1, *grid), method='decode_codes'))
  return nchw(out.quantized.inputs), out.quantized.codes.reshape(len(image), -1), nchw(out.recon), pictures


def texts(run, captions):
  encode = text_encoder(run.tokenizer, run.config['tokenizer'])
  return np.stack([encode(c) for c in captions])


def of_dalle(config, words, codes, grid):
  sizes = variants.text_sizes({**config['tokenizer']})
  return dalle.build(**{**config['model'], **sizes, 'image_vocab': codes, 'grid': grid, 'dtype': 'float32'})


def greedy(apply, text, length, empty=None, guidance=1.0):
  """Samples codes with our KV cache."""
  none = jnp.zeros((len(text), 0), jnp.int32)
  keys = jax.random.split(jax.random.key(0), len(text))
  sampling = decoding.Sampling(temperature=0.0, guidance=guidance)
  options = dict(empty=text[0] if empty is None else empty, length=length, n=1, sampling=sampling)
  return decoding.sample(apply, jnp.asarray(text), none, keys, **options)


def pixels(pictures):
  return np.clip(pictures * 0.5 + 0.5, 0, 1)


def mindalle(folder, arrays):
  run = read('mindalle', folder / '1.3B')
  params = run.network('dalle')
  codes, length = run.frozen['vqgan'].config['model']['num_codes'], arrays['in_codes'].shape[1]
  side = int(length**0.5)
  model, text = of_dalle(run.config, run.tokenizer, codes, (side, side)), arrays['in_texts']
  forward = jax.jit(lambda p, t, i: model.apply({'params': p}, t, i))
  text_logits, image_logits = forward(params, text, arrays['in_codes'])
  apply = lambda p: lambda *args, method: model.apply({'params': p}, *args, method=method)
  drawn = jax.jit(lambda p, t: greedy(apply(p), t, length))(params, text)
  prequant, own, recon, pictures = image_tokens(run, arrays['in_image'], codes)
  probable = jax.jit(
    lambda logits: jax.nn.softmax(decoding.filter_logits(decoding.filter_logits(logits / 0.7, top_k=24), top_p=0.8))
  )
  return {
    'out_token_ids': texts(run, json.loads((folder / 'captions.json').read_text())),
    'out_logits_img': image_logits,
    'out_logits_txt': text_logits,
    'out_greedy_codes': drawn,
    'out_greedy_logits': forward(params, text, drawn)[1],
    'out_greedy_pixels': pixels(pictures(drawn)),
    'out_decoded_codes': pictures(arrays['in_codes']),
    'out_image_codes': own,
    'out_recon': recon,
    'out_prequant': prequant,
    'out_topk_topp_probs': probable(arrays['in_logits']),
  }


def storydalle(folder, arrays):
  found, source_image = {}, arrays['in_src']
  captions = json.loads((folder / 'captions.json').read_text())
  b, t = arrays['in_sent_embeds'].shape[:2]
  text, sentences = arrays['in_texts'], jnp.asarray(arrays['in_sent_embeds'])
  for place in sorted(p.parent for p in folder.glob('*/Model')):
    kind = 'p' if place.name.endswith('prompt') else 'np'
    run = read('storydalle', place, cross=str(folder / 'cross_attention.pt'))
    codes = run.frozen['vqgan'].config['model']['num_codes']
    frames = arrays['in_images'].reshape(-1, *arrays['in_images'].shape[2:])
    _, image, _, pictures = image_tokens(run, np.concatenate([frames, source_image]), codes)
    image, source = image[: len(frames)], image[len(frames) :]
    side = int(image.shape[1] ** 0.5)
    base = of_dalle({**run.config, 'model': only_dalle(run.config['model'])}, run.tokenizer, codes, (side, side))
    added = {k: v for k, v in run.config['model'].items() if k not in only_dalle(run.config['model'])}
    model = story_dalle.StoryDALLE(dalle=base, **added)
    params = {'dalle': run.network('dalle'), 'story': run.network('story')}

    def parts(params, text, source, sentences, model=model, base=base):
      extra, _ = model.apply({'params': params}, text, source, sentences, method='conditioning')
      seen = base.apply({'params': params['dalle']}, source, method='embed_source')
      return extra, seen

    extra, seen = jax.jit(parts)(params, text, source, sentences)
    rows = text.reshape(b * t, -1)
    first = slice(0, t)  # story 0
    forward = jax.jit(lambda p, *x, base=base: base.apply({'params': p}, *x))

    def draw(params, rows, extra, context, base=base, length=image.shape[1]):
      model = story_dalle.StoryDALLE(dalle=base)

      def apply(*args, method):
        args = (*args, extra, context) if method == 'prefill' else args
        return model.apply({'params': {'dalle': params}}, *args, method=method)

      return greedy(apply, rows, length)

    draw = jax.jit(draw)
    for condition in ('nocond', 'cond'):
      cross = jax.tree.map(lambda x: x * (condition == 'cond'), params['story']['cross'])  # noqa: B023

      def context(of, seen=seen, cross=cross, base=base):
        """The context of these rows as the original lays it out, with the frame axis in the place of the positions."""
        whole = jnp.repeat(seen, t, axis=0)[of]
        whole = whole.reshape(-1, len(whole), whole.shape[-1]).transpose(1, 0, 2)
        mean, var = whole.mean(-1, keepdims=True), whole.var(-1, keepdims=True)
        whole = (whole - mean) * jax.lax.rsqrt(var + 1e-5)
        return CrossAttention(base.depth // 3, base.heads).apply({'params': cross}, whole)

      text_logits, image_logits = forward(params['dalle'], rows, image, extra, context(slice(None)))
      found |= {f'out_{kind}_{condition}_logits_img': image_logits, f'out_{kind}_{condition}_logits_txt': text_logits}
      drawn = draw(params['dalle'], rows[first], extra[first], context(first))
      found[f'out_{kind}_{condition}_greedy_full'] = drawn
      if (kind, condition) == ('np', 'cond'):
        found['out_greedy_pixels'] = pixels(pictures(drawn))
    if kind == 'np':
      x = params['story']['encoder']['linear']
      linear = sentences @ x['kernel'] + x['bias']
      positions = params['dalle']['text_positions'][: extra.shape[1]]
      found |= {'out_story_linear': linear, 'out_story_block': (extra - positions)[:, -1].reshape(b, t, -1)}
      found |= {'out_src_codes': source, 'out_codes': image, 'out_token_ids': texts(run, captions['tokens'])}
      assert np.array_equal(texts(run, [c for story in captions['story'] for c in story]).reshape(text.shape), text)
    else:
      found['out_p_soft_prompt'] = (extra - params['dalle']['text_positions'][: extra.shape[1]])[:1, :-1]
  return found


def only_dalle(model):
  own = ('retro', 'story_encoder', 'prompt', 'sentences', 'sentence_dim', 'frames')
  return {k: v for k, v in model.items() if k not in own}


def rudalle(folder, arrays):
  found, codes = {}, arrays['in_codes']
  for version in ('v3', 'v2'):
    run = read('rudalle', folder / f'pytorch_model_{version}.bin')
    params = run.network('dalle')
    side = int(codes.shape[1] ** 0.5)
    image_vocab = params['image_embed'].shape[0]
    model = of_dalle(run.config, None, image_vocab, (side, side))
    text = np.where(arrays['in_text'] == 0, model.padding, arrays['in_text'])
    n = codes.shape[1] if version == 'v3' else codes.shape[1] - 1  # v2 has a start token in front

    labels = np.concatenate([text, codes], 1)[:, int(version == 'v3') :]
    words = params['text_embed'].shape[0]
    ends = (
      (slice(0, model.text_length), slice(0, words)),
      (slice(model.text_length, labels.shape[1]), slice(words, None)),
    )

    def joint(params, text, image, labels, model=model, ends=ends):
      x = model.apply({'params': params}, text, image, method='features')
      heads = (model.apply({'params': params}, x, method=f'{kind}_logits') for kind in ('text', 'image'))
      logits = jnp.concatenate([*heads], -1)
      # In v3 the first image code is among the labels of the text, as if it were a text token: a bug of the original.
      return logits, [losses.token_loss(logits[:, at, ids], labels[:, at])[0] for at, ids in ends]

    logits, (text_loss, image_loss) = jax.jit(joint)(params, text, codes[:, :n], labels)
    loss = (text_loss + 7 * image_loss) / 8
    found |= {f'out_{version}_logits': logits, f'out_{version}_loss': np.array([loss, text_loss, image_loss])}
    for theirs, ours in (('row', 'row'), ('col', 'column'), ('conv', 'wrapped' if version == 'v2' else 'conv')):
      mask = Pattern(ours, model.text_length, (side, side)).mask(model.text_length + side**2)
      found[f'out_{version}_{theirs}_mask'] = mask.astype(np.uint8)
    apply = lambda p, model=model: lambda *args, method: model.apply({'params': p}, *args, method=method)
    drawn = jax.jit(lambda p, t: greedy(apply(p), t, codes.shape[1]))(params, text)  # noqa: B023
    found |= {f'out_{version}_greedy': drawn, f'out_{version}_greedy_cached': drawn}
  return found


def dalle_pytorch(folder, arrays):
  found = {}
  for place in sorted(p.parent for p in folder.glob('*/dalle.pt')):
    run = read('dalle_pytorch', place)
    frozen = run.frozen['vqgan']
    images, params = discrete_vae.build(**frozen.config['model']), frozen.network('discrete_vae')
    if not found:
      logits = applied(images, params, nhwc(arrays['in_image']) * 2 - 1, method='logits')
      found['out_vae_logits'], found['out_vae_codes'] = nchw(logits), logits.argmax(-1).reshape(len(logits), -1)
      found['out_vae_decoded'] = decoded(images, params, arrays['in_codes'])
    grid = images.grid(arrays['in_image'].shape[-1])
    model = of_dalle(run.config, None, images.num_codes, grid)
    guided = f'out_{place.name}_cond3_intended' in arrays
    of_one = dalle_pytorch_outputs(model, run.network('dalle'), arrays, guided)
    of_one['greedy_image'] = decoded(images, params, of_one['greedy'])
    found |= {f'out_{place.name}_{name}': value for name, value in of_one.items()}
  return found


def decoded(images, params, codes):
  side = int(codes.shape[1] ** 0.5)
  return nchw(applied(images, params, np.asarray(codes).reshape(-1, side, side), method='decode_codes'))


def dalle_pytorch_outputs(model, params, arrays, guided):
  text, codes = np.where(arrays['in_text'] == 0, model.padding, arrays['in_text']), arrays['in_codes']
  t, words = model.text_length, model.text_vocab

  def joint(codes):
    """Logits of all ids at all positions; 0 for image at the positions of text, and the other way round."""
    run = lambda *x, method: model.apply({'params': params}, *x, method=method)
    x = run(text, codes, method='features')
    of_text, of_image = run(x[:, :t], method='text_logits'), run(x[:, t:], method='image_logits')
    pad = lambda x, left, right: jnp.pad(x, ((0, 0), (0, 0), (left, right)))
    return jnp.concatenate([pad(of_text, 0, model.image_vocab), pad(of_image, words, 0)], 1)

  @jax.jit
  def forward(codes):
    logits, given = joint(codes[:, :-1]), codes.shape[1] // 2 + 1
    text_loss, _ = losses.token_loss(logits[:, :t, :words], text)
    image_loss, _ = losses.token_loss(logits[:, t:, words:], codes)
    return logits, (text_loss + 7 * image_loss) / 8, joint(codes[:, :given])[:, -3:]

  def draw(guidance):
    apply = lambda *args, method: model.apply({'params': layers}, *args, method=method)
    return jax.jit(lambda text: greedy(apply, text, codes.shape[1], model.padding, guidance))(text)

  layers = decode_params.by_layer(params)
  (logits, loss, prefix), drawn = forward(codes), draw(1.0)
  found = {'logits': logits, 'loss': loss, 'logits_prefix': prefix, 'greedy': drawn, 'greedy_cached': drawn}
  return found | ({'cond3_intended': draw(3.0)} if guided else {})


def min_dalle(folder, arrays):
  run = read('min_dalle', folder)
  config, params, frozen = run.config, run.network('dalle'), run.frozen['vqgan']
  image = vqgan.build(**frozen.config['model'])
  grid = image.grid(config['data']['image_size'])
  sizes = variants.text_sizes(config['tokenizer']) | dalle_mini.caption_ids(config['tokenizer'])
  model = dalle_mini.build(**config['model'], **sizes, dtype='float32')
  text, inputs = arrays['in_text_tokens'], arrays['in_prev_tokens']
  assert (model.padding == text[0]).all() and inputs[0, 0] == model.start_token
  both = lambda m, codes: (m.encode(text), m.features(text, jnp.tile(codes, (2, 1))) @ m.image_head.T)
  forward = jax.jit(lambda p, codes: model.apply({'params': p}, codes, method=both))
  encoded, logits = forward(params, inputs[:, 1:])
  apply = lambda p: lambda *args, method: model.apply({'params': p}, *args, method=method)
  draw = jax.jit(lambda p: greedy(apply(p), text[1:], inputs.shape[1], model.padding, 16.0))
  drawn = draw(decode_params.by_layer(params))
  # Codes are greedy if each is the most probable one after those before it: for those without guidance none are drawn.
  probable = forward(params, arrays['out_greedy_tokens_f1'][:, :-1])[1][1:, :, : model.image_vocab].argmax(-1)
  decode = jax.jit(lambda c: image.apply({'params': frozen.network('vqgan')}, c, method='decode_codes'))
  pictures = lambda c: 255 * pixels(decode(c))
  rows, most = [], arrays['out_token_ids'].shape[1]
  spell = {'\U0001f600': 'grinning_face', '\U0001f680': 'rocket'}  # theirs reads the names of emoji, ours drops them
  encode = text_encoder(run.tokenizer, {**config['tokenizer'], 'length': most})
  for caption in json.loads((folder / 'captions.json').read_text()):
    ids = encode(caption.translate(str.maketrans(spell)))
    rows.append(np.where(np.arange(most) < (ids != model.pad).sum(), ids, -1))
  found = {
    'out_token_ids': np.stack(rows),
    'out_encoder_state': encoded,
    'out_decoder_logits': logits,
    'out_greedy_tokens_f1': probable,
    'out_greedy_tokens_f16': drawn,
    'out_image_sub': pictures(np.reshape(drawn, (1, *grid)))[0, ::4, ::4],
  }
  if 'out_grid_sub' in arrays:  # not in the fixture: these take long
    # Of 2 x 2 pictures, those in a column are consecutive.
    board = lambda x: np.concatenate([np.concatenate([*column]) for column in x.reshape(2, 2, *x.shape[1:])], 1)
    several = arrays['in_image_tokens'].reshape(-1, *grid)
    found['out_grid_sub'] = board(np.concatenate([pictures(x[None]) for x in several]))[::8, ::8]
    found['out_grid_seamless_sub'] = pictures(board(several)[None])[0, ::8, ::8]
  return found


def openai_dvae(folder, arrays):
  run = read('openai_dvae', folder)
  model, params = dvae.build(**run.config['model']), run.network('dvae')
  image = nhwc(arrays['in_image']) * 2 - 1
  logits = applied(model, params, image, method='logits')
  codes = logits.argmax(-1)
  statistics = applied(model, params, codes, method='statistics')
  unit = lambda x: nchw((x + 1) / 2)
  decode = lambda codes: unit(applied(model, params, codes, method='decode_codes'))
  return {
    'out_mapped': 0.8 * arrays['in_image'] + 0.1,
    'out_z_logits': nchw(logits),
    'out_codes': codes,
    'out_x_stats': nchw(statistics),
    'out_x_rec': decode(codes),
    'out_decoded_codes': decode(arrays['in_codes']),
  }


def shorter(tree):
  """The parameters of a tower without its last block."""
  return {**tree, 'encoder': jax.tree.map(lambda x: x[:-1], tree['encoder'])}


def clip_hf(folder, arrays):
  run = read('clip', folder)
  text, config = run.config['tokenizer'], run.config['model']
  sizes = dict(vocab_size=text['vocab_size'], text_length=text['length'])
  model, less = (clip.build(**{**config, **sizes, **fewer}) for fewer in (
    {}, {'layers': config['layers'] - 1, 'text_layers': config['text_layers'] - 1}
  ))  # fmt: skip
  params = run.network('clip')
  seen, ids = jnp.asarray(arrays['in_attention_mask'], bool), arrays['in_input_ids']
  image = nhwc(arrays['in_pixel_values']) * np.array(STD) * 2 + np.array(MEAN) * 2 - 1

  @functools.partial(jax.jit, static_argnums=(0, 2))
  def tower(model, params, name, *inputs):
    run = lambda m, *x: getattr(m, name)(*x)
    features, state = model.apply({'params': params}, *inputs, method=run, mutable='hidden')
    last = state['hidden'][name]['last'][0]
    return features[0] if name == 'text' else features, last, state['hidden'][name]['pooled'][0]

  def last_norm(x):
    scale, bias = (params['text']['norm_out'][k] for k in ('scale', 'bias'))
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + config['eps'])
    return x * scale + bias

  fewer = {**params, 'image': shorter(params['image']), 'text': shorter(params['text'])}
  text_features, text_last, text_pooled = tower(model, params, 'text', ids, seen)
  _, plain_last, plain_pooled = tower(model, params, 'text', ids)
  image_features, image_last, image_pooled = tower(model, params, 'image', image)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  text_embeds, image_embeds, scale = unit(text_features), unit(image_features), np.exp(params['logit_scale'])
  return {
    'out_token_ids': texts(run, json.loads((folder / 'captions.json').read_text())['tokens']),
    'out_text_features': text_features,
    'out_image_features': image_features,
    'out_text_embeds': text_embeds,
    'out_image_embeds': image_embeds,
    'out_logits_per_text': text_embeds @ image_embeds.T * scale,
    'out_logits_per_image': image_embeds @ text_embeds.T * scale,
    'out_logit_scale_exp': scale,
    'out_text_last_hidden': last_norm(text_last),
    'out_text_last_hidden_nomask': last_norm(plain_last),
    'out_text_pooled': text_pooled,
    'out_text_pooled_nomask': plain_pooled,
    'out_text_penultimate': tower(less, fewer, 'text', ids, seen)[1],
    'out_vision_last_hidden': image_last,
    'out_vision_pooled': image_pooled,
    'out_vision_penultimate': tower(less, fewer, 'image', image)[1],
  }


def roberta_hf(folder, arrays):
  run = read('roberta', folder)
  params, ids = run.network('roberta'), arrays['in_input_ids']
  model = roberta.build(**run.config['model'])
  less = roberta.build(**{**run.config['model'], 'layers': model.layers - 1})
  seen = jnp.asarray(arrays['in_attention_mask'], bool)
  last, pooled = applied(model, params, ids, seen)
  return {
    'out_token_ids': texts(run, json.loads((folder / 'captions.json').read_text())['tokens']),
    'out_last_hidden': last,
    'out_pooled': pooled,
    'out_embeddings': applied(model, params, ids, method='embed_text'),
    'out_penultimate': applied(less, shorter(params), ids, seen)[0],
    'out_last_hidden_nomask': applied(model, params, ids, jnp.ones_like(seen))[0],
    'out_mean_pooled': applied(model, params, ids, method='encode_text'),
  }


def of_lpips(folder, arrays):
  run = read('lpips', folder)
  model, params = lpips.build(**run.config['model']), run.network('lpips')
  x, y = nhwc(arrays['in_x']), nhwc(arrays['in_y'])
  terms = applied(model, params, x, y, method='terms')
  features = applied(model, params, x, method='features')
  found = {f'out_feat{i}': nchw(f) for i, f in enumerate(features)}
  assert model.depths == lpips_source.DEPTHS
  return found | {'out_layers': terms, 'out_lpips': terms.sum(1)[:, None, None, None]}


def of_inception(folder, arrays):
  run = read('inception', folder)
  model, params = inception.of_run(run.config), run.network('inception')
  features = lambda x: applied(model, params, to_float(nhwc(x)))
  return {f'out_{name}': features(arrays[f'in_{name}']) for name in ('small', 'large')}


def unclip_diffusers(folder, arrays):
  other = folder / 'karlo-image-variations'
  run = read('karlo', folder / 'karlo', image_encoder=str(other))
  parts = run.frozen
  words, small = parts['clip'], unclip.of_run(run.config, parts['clip'].config)
  (model, reader), (guess, _) = small, prior.of_run(parts['prior'].config, words.config)
  up = upsampler.of_run(parts['upsampler'].config)
  of = lambda run, player: run.network(player)
  clip_params, guess_params, params = of(words, 'clip'), of(parts['prior'], 'prior'), of(run, 'unclip')
  first, last = (of(parts['upsampler'], name) for name in ('upsampler', 'last'))
  prompts = json.loads((folder / 'prompts.json').read_text())
  ids = texts(words, prompts)
  read_text = jax.jit(reader.encode_text)
  caption, empty = (read_text(clip_params, x) for x in (ids, np.tile(reader.empty_ids, (2, 1))))
  predict = jax.jit(lambda x, t, c: guess.apply({'params': guess_params}, x, jnp.full(len(x), t), c))
  paint = jax.jit(lambda x, t, e, c, k: model.apply({'params': params}, x, jnp.full(len(x), t), e, c, k))
  sharpen = jax.jit(lambda p, x, t, low: up.apply({'params': p}, x, jnp.full(len(x), t), low))
  widen = lambda low: jax.image.resize(jnp.clip(low, -1, 1), (*low.shape[:1], up.image_size, up.image_size, 3), 'cubic')
  back = jax.jit(diffusion.reverse_step, static_argnums=(0, 3, 4))
  guide = jax.jit(diffusion.guide, static_argnums=0)

  def down(d, step_of, x, noise, count):
    steps = d.timesteps(count)
    for i, (t, then) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
      x = back(d, step_of(i, x, t), x, t, then, noise[i] if i < len(noise) else 0.0)
    return x

  def paint_guided(embed, about, scale):
    known = lambda value: jnp.full(2, value)
    return lambda i, x, t: guide(
      model.diffusion, paint(x, t, embed, about, known(True)), paint(x, t, embed, empty, known(False)), scale
    )

  def finish(small):
    noise, counts = [nhwc(x) for x in arrays['in_noise_sr']], arrays['in_steps']
    low = jnp.clip(small, -1, 1)
    use = lambda i, x, t: sharpen(last if i == counts[2] - 1 else first, x, t, low)
    return down(up.diffusion, use, nhwc(arrays['in_super_res_latents']), noise, int(counts[2]))

  t, latents, picture = arrays['in_t'], arrays['in_prior_latents'], nhwc(arrays['in_decoder_latents'])
  large, counts = nhwc(arrays['in_super_res_latents']), arrays['in_steps']
  embedding = jax.jit(lambda x: guess.apply({'params': guess_params}, x, method='embedding'))
  conditions = jax.jit(lambda e, c, known: model.apply({'params': params}, e, c, known, method='conditions'))
  # The same embedding for both prompts: the first row ignores it, the second uses it.
  embed, half = np.tile(latents[:1], (2, 1)), jnp.array([False, True])
  tokens, time, _ = conditions(embed, caption, half)
  out, seen = predict(latents, t[0], caption), paint(picture, t[1], embed, caption, half)
  low = jnp.clip(picture, -1, 1)
  sharp = [sharpen(p, large, t[2], low) for p in (first, last)]
  noises = {k: arrays[f'in_step_noise_{k}'] for k in ('prior', 'decoder', 'sr')}
  found = {
    'out_input_ids': ids,
    'out_attention_mask': np.asarray(caption.mask).astype(np.int64),
    'out_text_embeds': caption.embed,
    'out_text_hidden': caption.hidden,
    'out_prior': out,
    'out_prior_post': embedding(latents),
    'out_textproj_hidden': tokens,
    'out_textproj_time': time,
    'out_decoder': nchw(seen),
    'out_upscaled': nchw(widen(picture)),
    'out_sr_first': nchw(sharp[0]),
    'out_sr_last': nchw(sharp[1]),
    'out_step_prior': back(guess.diffusion, out, latents, 500, 250, noises['prior']),
    'out_step_sr': nchw(back(up.diffusion, sharp[0], large, 166, 0, nhwc(noises['sr']))),
  }
  for name, later, then in (('decoder', 666, 333), ('decoder_t1', 1, 0), ('decoder_t0', 0, -1)):
    found[f'out_step_{name}'] = nchw(back(model.diffusion, seen, picture, later, then, nhwc(noises['decoder'])))
  # Both pipelines, from captions and from images
  guided = lambda i, x, t: guide(guess.diffusion, predict(x, t, caption), predict(x, t, empty), 4.0)
  drawn = down(guess.diffusion, guided, latents, arrays['in_noise_prior'], int(counts[0]))
  noise, unit = [nhwc(x) for x in arrays['in_noise_decoder']], lambda x: jnp.clip(x * 0.5 + 0.5, 0, 1)
  small = down(model.diffusion, paint_guided(embedding(drawn), caption, 3.0), picture, noise, int(counts[1]))
  sharp = finish(small)
  found |= {'out_pipe_prior': drawn, 'out_pipe_decoder': nchw(small), 'out_pipe_sr': nchw(sharp)}
  pixels = nhwc(arrays['in_pixel_values']) * np.array(STD) * 2 + np.array(MEAN) * 2 - 1
  embeds = jax.jit(reader.encode_image)(clip_params, pixels)
  varied = finish(down(model.diffusion, paint_guided(embeds, empty, 3.0), picture, noise, int(counts[1])))
  return found | {'out_pipe_image': unit(sharp), 'out_var_image_embeds': embeds, 'out_var_image': unit(varied)}


def torch_formats(folder, arrays):
  """Returns the tensors of the last file, after comparing the other files with it."""
  names = [k.removeprefix('out_') for k in arrays if k.startswith('out_')]
  several = []
  for path in sorted(p for p in Path(folder).iterdir() if p.suffix in ('.pt', '.pth', '.ckpt')):
    tensors = files.state_dict(path)
    several.append({f'out_{name}': tensors[name.replace('/', '.')].numpy() for name in names})
    assert isinstance(torch_file.load(path), dict)
  for other in several[:-1]:
    for name, value in several[-1].items():
      np.testing.assert_array_equal(other[name], value)
  return several[-1]


KINDS = {
  'taming_vqgan': taming,
  'taming_gumbel_vqgan': taming,
  'mindalle': mindalle,
  'storydalle': storydalle,
  'rudalle': rudalle,
  'min_dalle': min_dalle,
  'openai_dvae': openai_dvae,
  'dalle_pytorch': dalle_pytorch,
  'clip_hf': clip_hf,
  'roberta_hf': roberta_hf,
  'lpips': of_lpips,
  'inception': of_inception,
  'torch_formats': torch_formats,
  'unclip_diffusers': unclip_diffusers,
}
