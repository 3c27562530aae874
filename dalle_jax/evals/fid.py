"""The Frechet distance between the features of two sets of images ("GANs Trained by a Two Time-Scale Update Rule",
Heusel et al., 2017).

Distances are comparable only when the network, the resize, the reference images and the number of images are the same,
so a reference carries a hash of all of them. Published ones use the Inception-v3 of `models.inception`.
"""

import dataclasses
import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dalle_jax.functional.pixels import to_float
from dalle_jax.models import classifier, clip, inception
from dalle_jax.training import checkpoint, sharding

BATCH = 64  # images through a network at once


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Statistics of a set of features: mean float64[E], cov float64[E, E], their number, and a hash of their origin."""

  mean: np.ndarray
  cov: np.ndarray
  count: int
  sha256: str


def statistics(features: np.ndarray, sha256: str = '') -> Statistics:
  """Mean and unbiased covariance of [N, E], in float64.

  `sha256` identifies the images and the network that the features come from; by default it is the hash of the features
  themselves, whose last bits differ from machine to machine. Raises ValueError for N < 2 or values that are not finite.
  """
  if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
    raise ValueError(f'features are {list(features.shape)}; a covariance needs [N, E] with N of 2 or more.')
  x = np.asarray(features, np.float64)
  if not np.isfinite(x).all():
    raise ValueError('some features are not finite; the network or the images are damaged.')
  if not sha256:
    kind = f'{features.dtype}{list(features.shape)}'.encode()
    sha256 = hashlib.sha256(kind + np.ascontiguousarray(features).tobytes()).hexdigest()
  return Statistics(x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]), len(x), sha256)


def reference(path: str | Path, network: 'FeatureExtractor', resize: int = 0) -> Statistics:
  """Saved statistics of a set of images: a .npz with mu [E] and sigma [E, E].

  The paper's own code and pytorch-fid save such files, which do not record the number of images (count is then 0);
  `FeatureSet.save` also records the number, the network and the resize. Raises FileNotFoundError for a missing file,
  ValueError for a file in another format and for statistics by another network or resize.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no file {path}; give a .npz with mu and sigma, as pytorch-fid saves them.')
  if not zipfile.is_zipfile(path):
    raise ValueError(f'{path} is not a whole .npz file; expected one with mu and sigma, as pytorch-fid saves them.')
  try:
    with np.load(path) as file:
      mean, cov = (file[name].astype(np.float64, casting='same_kind') for name in ('mu', 'sigma'))
      saved = {name: file[name].item() for name in ('count', 'sha256', 'by') if name in file}
  except (ValueError, TypeError, OSError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as e:
    raise ValueError(f'{path} has no mu and sigma ({e}); expected a .npz as pytorch-fid saves them.') from e
  finite = np.isfinite(mean).all() and np.isfinite(cov).all()
  if mean.ndim != 1 or cov.shape != 2 * mean.shape or not finite or not np.allclose(cov, cov.T):
    shapes = f'mu {list(mean.shape)} and sigma {list(cov.shape)}'
    raise ValueError(f'{path} has {shapes}; expected finite values, [E] and a symmetric [E, E].')
  extractor = extractor_id(network, resize)
  if len(mean) != network.width or saved.get('by', extractor) != extractor:
    raise ValueError(f'{path} comes from another network or another resize than {network.run}; use the same for both.')
  sha256 = saved.get('sha256') or hashlib.sha256(mean.tobytes() + cov.tobytes()).hexdigest()
  return Statistics(mean, cov, saved.get('count', 0), sha256)


def extractor_id(network: 'FeatureExtractor', resize: int) -> str:
  """What features depend on, in addition to the images."""
  return f'{network.kind} {network.sha256} {resize}'


def frechet(a: Statistics, b: Statistics) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0; symmetric and 0 for equal sets up to rounding.

  With N < E a covariance has rank N - 1 at most. The distance is still exact for those degenerate Gaussians: the trace
  of the root is the sum of the singular values of A^(1/2) B^(1/2), which needs no inverse and no jitter and never
  becomes complex. But few samples make the distance larger, by about the spread over the E - N directions that they do
  not span: compare only sets of the same size. Raises ValueError when the two have a different E.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(f'the features have {len(a.mean)} and {len(b.mean)} dimensions; use the same network for both.')
  overlap = np.linalg.svd(_root(a.cov) @ _root(b.cov), compute_uv=False).sum()
  distance = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap
  return max(float(distance), 0.0)  # rounding may leave -1e-14


def _root(cov: np.ndarray) -> np.ndarray:
  """The symmetric root of a covariance, with the eigenvalues that are zero up to rounding set to zero."""
  values, vectors = np.linalg.eigh(cov)
  noise = np.finfo(np.float64).eps * len(cov) * max(values[-1], 0.0)
  return (vectors * np.sqrt(np.where(values > noise, values, 0.0))) @ vectors.T


def resized(images: np.ndarray, size: int) -> np.ndarray:
  """uint8[N, S, S, 3] -> uint8[N, size, size, 3], bicubic and antialiased; a size of 0 or S changes nothing."""
  if not size or images.shape[1:3] == (size, size):
    return images
  resize = lambda x: np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC))
  return np.stack([resize(x) for x in images])


class FeatureSet:
  """The features of a set of images by one network, added batch by batch; the images themselves are not kept.

  `resize` is the side in pixels that images are brought to before the network resizes them to its own input; 0 for
  none. A trap: published StoryDALL-E distances are those of images resized to 64 x 64 first, which lowers them.
  """

  def __init__(self, network: 'FeatureExtractor', resize: int = 0):
    self.network, self.resize = network, resize
    self._digest = hashlib.sha256(extractor_id(network, resize).encode())
    self._waiting: list[np.ndarray] = []  # images, until there is a batch of them
    self._features: list[np.ndarray] = []

  def add(self, images: np.ndarray) -> None:
    """Adds uint8[N, S, S, 3]."""
    images = resized(images, self.resize)
    for image in images:  # one by one, so that the hash does not depend on how they were batched
      self._digest.update(f'{list(image.shape)}'.encode() + image.tobytes())
      self._waiting.append(image)
    while len(self._waiting) >= BATCH:
      self._extract()

  def _extract(self) -> None:
    part, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
    self._features.append(self.network.features(np.stack(part)))

  def statistics(self) -> Statistics:
    """Their hash is that of the images in order, the resize and the network. Raises ValueError for fewer than two."""
    if self._waiting:
      self._extract()
    features = np.concatenate(self._features) if self._features else np.zeros((0, 1))
    return statistics(features, self._digest.hexdigest())

  def save(self, path: str | Path, stats: Statistics) -> None:
    """Writes the statistics of this set in the form that `reference` reads."""
    by = extractor_id(self.network, self.resize)
    np.savez(path, mu=stats.mean, sigma=stats.cov, count=stats.count, sha256=stats.sha256, by=by)


def report(drawn: FeatureSet, true: FeatureSet | Statistics) -> dict[str, Any]:
  """'fid', and what makes it comparable: network, resize, feature and image counts, the hash of the reference `true`.

  Prints a warning when there are fewer images than features. Raises ValueError for fewer than two images.
  """
  a, network = drawn.statistics(), drawn.network
  b = true if isinstance(true, Statistics) else true.statistics()
  known = [x.count for x in (a, b) if x.count]
  if min(known) < len(b.mean):
    counts = f'{" and ".join(map(str, known))} images with {len(b.mean)} features'
    print(f'warning: the FID of {counts} is biased upwards; use more images than features.', flush=True)
  by = {'kind': network.kind, 'run': network.run, 'step': network.step, 'sha256': network.sha256}
  sizes = {'fid_features': len(b.mean), 'fid_pictures': [a.count, b.count], 'fid_resize': drawn.resize}
  return {'fid': frechet(a, b), 'fid_network': by, **sizes, 'fid_reference_sha256': b.sha256}


KINDS: dict[str, tuple[Any, str]] = {  # objective -> its module, the method that computes features
  'inception': (inception, '__call__'),
  'classifier': (classifier, 'features'),
  'clip': (clip, 'encode_image'),
}


class FeatureExtractor:
  """Image features by an imported Inception-v3, a trained classifier or a CLIP: `FeatureExtractor.load(run)`.

  They are computed in float32 on every device, whatever `dtype` the run has: with bfloat16, also the default of a TPU,
  distances would differ from those of other machines.

  Attributes:
    model, kind: the module, and its objective, one of `KINDS`.
    run, step: the checkpoint.
    sha256: the hash of its parameters.
  """

  def __init__(self, run: checkpoint.Run, mesh: Mesh | None = None):
    """Takes a run on one device or replicated over `mesh`.

    Raises ValueError for a run of another objective, and for a CLIP without an image tower.
    """
    self.kind = str(run.config.get('objective'))
    if self.kind not in KINDS:
      raise ValueError(f'{run.path} is a run of {self.kind!r}; image features need one of {", ".join(KINDS)}.')
    module, method = KINDS[self.kind]
    self.model, self.run, self.step = module.of_run(run.config), run.path, run.step
    if hasattr(self.model, 'dtype'):  # bfloat16 in some runs
      self.model = self.model.clone(dtype=jnp.float32)
    if self.kind == 'clip' and not self.model.image_size:
      raise ValueError(f'{run.path} is a CLIP without its image tower; convert it again with it.')
    self._params, self._mesh = run.network(self.kind), mesh
    digest = hashlib.sha256()
    for name, value in sorted(sharding.flatten(self._params).items()):
      digest.update(f'{name} {value.dtype}{list(value.shape)}'.encode() + np.asarray(value).tobytes())
    self.sha256 = digest.hexdigest()
    self._features = sharding.program(forward, self.model, method, mesh=mesh)
    self._logits = sharding.program(forward, self.model, '__call__', mesh=mesh)

  @classmethod
  def load(cls, path: str | Path, mesh: Mesh | None = None) -> 'FeatureExtractor':
    """Loads a run. Raises FileNotFoundError when it has no checkpoint, ValueError for a run of another objective."""
    return cls(checkpoint.load_run(path, mesh=mesh), mesh)

  @property
  def width(self) -> int:
    """The number of features of an image; nothing is computed."""
    side = getattr(self.model, 'image_size', 0) or 32
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    return jax.eval_shape(self._features, self._params, images).shape[1]

  def features(self, images: np.ndarray) -> np.ndarray:
    """uint8[N, S, S, 3] of any size -> float32[N, E]: the input of the logits, or the embedding of a CLIP.

    Raises ValueError for features that are not finite.
    """
    return self._in_batches(self._features, images)

  def labels(self, images: np.ndarray) -> np.ndarray:
    """uint8[N, S, S, 3] of any size -> bool[N, C], the labels with a probability above 0.5.

    Raises ValueError unless this is a classifier, with finite logits.
    """
    if self.kind != 'classifier':
      raise ValueError(f'{self.run} is a run of {self.kind!r}; labels need a run of the objective classifier.')
    return self._in_batches(self._logits, images) > 0

  def _in_batches(self, function: Any, images: np.ndarray) -> np.ndarray:
    results, shards = [], sharding.batch_shards(self._mesh) if self._mesh else 1
    size = -(-BATCH // shards) * shards  # a multiple of the number of shards
    for start in range(0, len(images), size):
      part = resized(
        images[start : start + size], getattr(self.model, 'image_size', 0)
      )  # Inception-v3 resizes by itself
      batch = {'image': np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])}  # of one size
      batch = sharding.put_whole(batch, self._mesh) if self._mesh else batch
      results.append(np.asarray(function(self._params, batch['image']))[: len(part)])
    result = np.concatenate(results)
    if not np.isfinite(result).all():  # at the first images, not after hours; and NaN would be no label at all
      raise ValueError(f'{self.run} computes values that are not finite; it is damaged.')
    return result


@jax.default_matmul_precision('highest')
def forward(model: Any, method: str, params: Any, images: jax.Array) -> jax.Array:
  """What `method` of the network makes of images uint8[B, H, W, 3]; under jit."""
  return model.apply({'params': params}, to_float(images), method=method)
