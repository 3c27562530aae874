"""Run directories of networks with random parameters, for tests of what is done with a run: nothing is trained."""

import contextlib
import functools
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from dalle_jax.training import sharding
from dalle_jax.training.checkpoint import Run, export_run
from dalle_jax.training.plan import Plan

ROOT = Path(__file__).parents[1]
# Fields of the smallest networks: programs of few arrays are compiled quickly.
VQGAN = dict(variant='test', image_size=24, patch=6, ch_mult=(1,), attn_resolutions=())  # 4 x 4 codes of 16
DALLE = dict(variant='test', depth=2)
UNET = dict(variant='test', channels=(8,), attention=(0,))


def call(script, *arguments):
  """The exit status of a script's `main` with these arguments, whatever flags it was called with before."""
  for name in script.FLAGS:
    script.FLAGS[name].unparse()
  return script.main([script.__name__, *map(str, arguments)])


@contextlib.contextmanager
def one_device():
  """Meshes are of one device, for which training compiles in two thirds of the time that eight take."""
  make = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda sizes, devices=None: make(sizes, devices or jax.devices()[:1]))
    yield


@contextlib.contextmanager
def fine_tuning():
  """Training on one device that starts from another run: its parameters replace zeros, which compile to nothing."""
  zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
  with one_device(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(Plan, 'init', lambda self: jax.tree.map(zeros, self.state))
    yield


def parameters(init, *inputs, scale=0.3, seed=0):
  """Random parameters for what `init(key, *inputs)` makes; nothing is compiled. Norms begin as they always do."""
  leaves, tree = jax.tree.flatten(inputs)
  rng, shapes = np.random.default_rng(seed), _shapes(init, tuple(jax.typeof(x) for x in leaves), tree)

  def leaf(path, x):
    ones = jax.tree_util.keystr(path, simple=True, separator='/').endswith(('scale', 'var'))
    return np.ones(x.shape, x.dtype) if ones else rng.normal(0, scale, x.shape).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def _shapes(init, leaves, tree):
  inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
  return nn.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))


def write(path, kind, model, config, *inputs, words=None, frozen=(), players=False):
  """A run of the objective `kind` in `path`; `frozen` ones lie beside it; with `players` parameters are by player."""
  params = parameters(model.init, *inputs)['params']
  frozen = {name: str(path.parent / name) for name in frozen}
  config = {'objective': kind, **config}
  export_run(path, Run(config, params if players else {kind: params}, words and words.to_json(), 3, str(path), frozen))
