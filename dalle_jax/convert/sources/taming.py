"""VQModel and GumbelVQ of taming-transformers (Esser et al., 2021), with their discriminator and LPIPS.

Stage 1 of minDALL-E and the image tokenizer of ru-DALLE have the same layout.

Files: a pytorch-lightning checkpoint (last.ckpt) and its config (model.yaml), in one folder, or in checkpoints/ and
configs/ of a training log.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, conv, conv2d, convert, named, row
from dalle_jax.convert.sources import lpips
from dalle_jax.models import patchgan, vqgan

EXPECTED = 'last.ckpt and model.yaml of taming-transformers in a folder, or in checkpoints/ and configs/ of a log'
NAMES = (  # ours -> theirs, without the leaf
  (r'(encoder|decoder)/(down|up)_(\d+)_(block|attn)_(\d+)/(\w+)', r'\1.\2.\3.\4.\5.\6'),
  (r'(encoder|decoder)/(down|up)_(\d+)_(downsample|upsample)/conv', r'\1.\2.\3.\4.conv'),
  (r'(encoder|decoder)/mid_(block|attn)_(\d)/(\w+)', r'\1.mid.\2_\3.\4'),
  (r'(encoder|decoder)/(conv_in|conv_out|norm_out)', r'\1.\2'),
  (r'conv_out', r'decoder.conv_out'),
  (r'(quant_conv|post_quant_conv)', r'\1'),
  (r'quantize/proj', r'quantize.proj'),
)
LEAVES = {'kernel': ('weight', conv), 'scale': ('weight', None), 'bias': ('bias', None)}


def rows(names: Sequence[str], gumbel: bool) -> list[Row]:
  """Rows of a VQGAN whose parameters have these names."""
  table = [row('quantize/embedding', 'quantize.embed.weight' if gumbel else 'quantize.embedding.weight')]
  for name in names:
    parent, _, leaf = name.rpartition('/')
    for ours, theirs in NAMES:
      if re.fullmatch(ours, parent):
        suffix, op = LEAVES[leaf]
        table.append(row(name, f'{re.sub(ours, theirs, parent)}.{suffix}', op))
        break
  return table


def fields(path: Path, sizes: Mapping[str, Any], embed_dim: int, n_embed: int, gumbel: bool = False) -> dict[str, Any]:
  """Returns the fields of our VQGAN for their ddconfig or hparams. Raises ValueError for an unsupported one."""
  lists = files.fields(path, sizes, 'ch_mult', 'attn_resolutions')
  whole = ('resolution', 'ch', 'num_res_blocks', 'z_channels', 'in_channels', 'out_ch')
  known = files.integers(path, sizes, *whole)
  for name, value in lists.items():
    if not isinstance(value, (list, tuple)) or any(type(n) is not int or n < 1 for n in value):
      raise ValueError(f'{path} has {name} {str(value)[:50]}; expected a list of whole numbers.')
  if not lists['ch_mult'] or not all(known[name] for name in whole):
    raise ValueError(f'{path} has a size of 0 or no ch_mult; expected {", ".join(whole)} of 1 or more.')
  if known['in_channels'] != 3 or known['out_ch'] != 3 or sizes.get('double_z'):
    raise ValueError(
      f'{path} describes a network that is not RGB or has double_z; expected 3 channels and double_z: false.'
    )
  return dict(
    variant='f16_1024',
    image_size=known['resolution'],
    ch=known['ch'],
    ch_mult=tuple(lists['ch_mult']),
    num_res_blocks=known['num_res_blocks'],
    attn_resolutions=tuple(lists['attn_resolutions']),
    z_channels=known['z_channels'],
    code_dim=embed_dim,
    num_codes=n_embed,
    quantizer='gumbel' if gumbel else 'nearest',
  )


def network(model: Mapping[str, Any]) -> ModuleSpec:
  module = vqgan.build(**model)
  return ModuleSpec.of(module, (1, module.image_size, module.image_size, 3))


def tokenizer(source: str, model: Mapping[str, Any], theirs: Mapping[str, Any], ignore: Sequence[str] = ()) -> Imported:
  """The run of a VQGAN without discriminator and LPIPS."""
  ours = network(model)
  table = rows(list(ours.shapes), model['quantizer'] == 'gumbel')
  params = convert(source, table, theirs, ours.shapes, ignore)
  config = {'objective': 'vqgan', 'model': dict(model), 'data': {'image_size': model['image_size']}}
  return Imported(config, named('vqgan', params), named('vqgan', ours.axes))


def discriminator(source: str, theirs: Mapping[str, Any], layers: int, width: int) -> tuple[dict, dict, Mapping]:
  """Returns the fields of our PatchGAN, its parameters and their logical axes."""
  sizes: dict[str, Any] = dict(variant='base', width=width, layers=layers, norm='fixed_batch')
  ours = ModuleSpec.of(patchgan.build(**sizes), (1, 64, 64, 3))
  table = [*conv2d('conv_0', 'main.0'), *conv2d('conv_out', f'main.{3 * layers + 2}')]
  for i in range(1, layers + 1):
    table += conv2d(f'conv_{i}', f'main.{3 * i - 1}', bias=False)
    leaves = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
    table += [row(f'norm_{i}/{leaf}', f'main.{3 * i}.{name}') for leaf, name in leaves.items()]
  return sizes, convert(source, table, theirs, ours.shapes, [r'.*\.num_batches_tracked']), ours.axes


def read(path: Path) -> Imported:
  """Reads a VQGAN and, if the file has them, its discriminator and LPIPS.

  Raises ValueError or OSError with a one-line message.
  """
  logs = ('checkpoints/last.ckpt', 'checkpoints/*.ckpt')
  weights = files.find(path, 'last.ckpt', '*.ckpt', '*.pt', '*.pth', '*.safetensors', *logs, expected=EXPECTED)
  folder = weights.parent.parent / 'configs' if weights.parent.name == 'checkpoints' else weights.parent
  # A resumed training writes another *project.yaml, with the same model.
  names = 'model.yaml', '*project.yaml', '*.yaml', '*.yml'
  description = files.find(folder, *names, expected=EXPECTED, several=True)
  config = files.config(description)
  config = config.get('model', config)
  known = files.fields(description, config, 'target', 'params.embed_dim', 'params.n_embed', 'params.ddconfig')
  kind = str(known['target']).rpartition('.')[2]
  if kind not in ('VQModel', 'GumbelVQ'):
    raise ValueError(f'{description} has target {kind}; expected VQModel or GumbelVQ.')
  model = fields(description, known['ddconfig'], known['embed_dim'], known['n_embed'], kind == 'GumbelVQ')
  theirs, source = files.state_dict(weights), str(weights)
  imported = tokenizer(source, model, theirs, [r'loss\..*', r'temperature_scheduler\..*'])
  loss = (config['params'].get('lossconfig') or {}).get('params') or {}
  judge, perceptual = files.under(theirs, 'loss.discriminator.'), files.under(theirs, 'loss.perceptual_loss.')
  settings: dict[str, Any] = {}
  if judge:
    if loss.get('use_actnorm') or loss.get('disc_conditional'):
      raise ValueError(
        f'{description} has a discriminator with actnorm or a condition; only one with neither can be read.'
      )
    sizes, params, axes = discriminator(source, judge, loss.get('disc_num_layers', 3), loss.get('disc_ndf', 64))
    imported.params.update(named('discriminator', params))
    imported.axes.update(named('discriminator', axes))
    settings['disc_variant'] = sizes.pop('variant')
    settings |= {'disc': sizes, 'disc_weight': float(loss.get('disc_weight', 1.0))}
  if perceptual:
    imported.frozen['lpips'] = lpips.of_tensors(source, perceptual, 'net.slice{stage}.{i}')
    settings['lpips_weight'] = float(loss.get('perceptual_weight', 1.0))
  if kind == 'GumbelVQ':
    settings['kl_weight'] = float(config['params'].get('kl_weight', 1e-8))  # that of GumbelVQ
  imported.config['loss'] = settings
  return imported
