"""FLOPs of one HLO instruction: matrix products, convolutions, and some kernels that are not HLO.

The kernels are splash attention on TPUs, and on GPUs cuDNN's attention and convolutions and cuBLAS's products.
"""

import math
import re

import numpy as np

from dalle_jax.aot.hlo import Computation, Instruction

SPLASH = {'splash_mha_fwd': 2, 'splash_mha_dq': 3, 'splash_mha_dkv': 4}  # matrix products per block of its grid
FLASH = re.compile(r'__cudnn\$fmha\w*Softmax(Backward)?$')  # with or without ScaleBias
KERNELS = ('tpu_custom_call', '__cudnn$', '__cublas$', '__cub$', '__gpu$', '__triton')  # prefixes of kernel names


def kernel(one: Instruction) -> str:
  """The name of the kernel that an instruction calls; '' for other custom calls, which are hints for the compiler."""
  target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
  return target[1] if one.opcode == 'custom-call' and target and target[1].startswith(KERNELS) else ''


def flops(one: Instruction, computation: Computation) -> float:
  """FLOPs of an instruction of the computation: two per multiply-add; 0 for anything but sums of products."""
  given = [computation[name].arrays[0].dims for name in one.operands if name in computation]
  called = kernel(one)
  if one.opcode == 'dot':
    return _matrices(one, given[0], re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.attributes))
  if called.startswith('__cublas$'):
    return _matrices(one, given[0], re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes))
  if one.opcode == 'convolution' or called.startswith('__cudnn$conv'):
    made = one.arrays[0].dims
    lhs, rhs, out = given[0], given[1], made
    if called.endswith('BackwardInput'):  # its attributes are those of the forward pass
      lhs, out = made, given[0]
    elif called.endswith('BackwardFilter'):
      rhs, out = made, given[1]
    return _convolution(one.attributes, lhs, rhs, out)
  if flash := FLASH.match(called):
    (b, queries, heads, head_dim), keys = given[0], given[1][1]
    # The backward pass recomputes the scores. What a mask hides is computed, too.
    scores = queries * (keys + 1) / 2 if '"CAUSAL"' in one.attributes else queries * keys
    return 2.0 * (5 if flash[1] else 2) * b * heads * head_dim * scores
  splash = next((n for name, n in SPLASH.items() if one.name.startswith(name)), 0)
  if called and splash:
    floats = [computation[name].arrays[0] for name in one.operands]
    *rows, length, head_dim = next(x.dims for x in floats if 'f' in x.dtype and len(x.dims) > 2)  # queries
    return 2.0 * splash * math.prod(rows) * head_dim * math.prod(given[0][1:]) * (length / given[0][1]) ** 2
  return 0.0


def _matrices(one: Instruction, left: tuple[int, ...], contracted: re.Match | None) -> float:
  axes = re.findall(r'\d+', contracted[1]) if contracted else []
  return 2.0 * math.prod(one.arrays[0].dims) * math.prod(left[int(i)] for i in axes)


def _convolution(attributes: str, left: tuple[int, ...], right: tuple[int, ...], made: tuple[int, ...]) -> float:
  """Two per product with input that is not padding: the TPU compiler writes batched matrix products as convolutions."""
  lhs, rhs, out = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes).groups()
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', (re.search(r'window=\{([^}]*)\}', attributes) or ['', ''])[1]))
  pairs = 1.0  # of an output position and a kernel position that read the input and not padding
  for i in range(len(out) - 2):
    axis = str(i)
    field = lambda name, default, i=i: window[name].split('x')[i] if name in window else default
    steps = np.arange(made[out.index(axis)])[:, None] * int(field('stride', '1'))
    inside = np.arange(right[rhs.index(axis)])[None] * int(field('rhs_dilate', '1'))
    spread, size = int(field('lhs_dilate', '1')), left[lhs.index(axis)]
    at = steps + inside - int(field('pad', '0_0').split('_')[0])
    pairs *= np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0))
  batch, features = (made[out.index(c)] for c in 'bf')
  return 2.0 * batch * features * right[rhs.index('i')] * float(pairs)
