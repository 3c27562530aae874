"""The Frechet distance against closed forms and scipy, where covariances are singular, and what its hash tells."""

import numpy as np
import pytest
import scipy.linalg

from dalle_jax.evals import fid
from dalle_jax.models import classifier
from dalle_jax.training.checkpoint import Run
from tests import runs

RNG = np.random.default_rng(0)


def gaussian(mean, cov):
  return fid.Statistics(np.asarray(mean, np.float64), np.asarray(cov, np.float64), 100, '')


def test_closed_forms():
  """Covariances that commute: |a - b|^2 + sum over directions of (sqrt(x) - sqrt(y))^2."""
  a, b = gaussian([0, 0], np.diag([4.0, 9.0])), gaussian([3, 4], np.diag([1.0, 16.0]))
  assert fid.frechet(a, b) == pytest.approx(25 + 1 + 1)
  turn = scipy.linalg.expm([[0, 0.7], [-0.7, 0]])
  turned = [gaussian(turn @ s.mean, turn @ s.cov @ turn.T) for s in (a, b)]
  assert fid.frechet(*turned) == pytest.approx(27)


@pytest.mark.parametrize('rows', [200, 7])
def test_symmetric_zero_for_equal_and_as_by_the_matrix_root(rows):
  x, y = RNG.normal(size=(rows, 12)), RNG.normal(size=(rows, 12)) @ RNG.normal(size=(12, 12)) + 1
  a, b = fid.statistics(x), fid.statistics(y)
  distance = fid.frechet(a, b)
  assert distance == pytest.approx(fid.frechet(b, a), rel=1e-9) and distance > 1
  assert fid.frechet(a, fid.statistics(x[::-1])) < 1e-9
  if rows > 12:  # with fewer the root of the singular product is not what scipy can find
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert distance == pytest.approx(expected, rel=1e-6)


def test_singular_covariances_are_exact():
  """Two lines in three dimensions, at right angles or not: the closed form of (A B)^(1/2) of rank one."""
  u, v = np.array([1.0, 0, 0]), np.array([0.6, 0.8, 0])
  a, b = gaussian(np.zeros(3), 4 * np.outer(u, u)), gaussian(np.zeros(3), 9 * np.outer(v, v))
  assert fid.frechet(a, b) == pytest.approx(4 + 9 - 2 * 2 * 3 * 0.6)
  assert fid.frechet(a, a) == pytest.approx(0, abs=1e-12)
  assert fid.frechet(a, gaussian([1, 0, 0], np.zeros((3, 3)))) == pytest.approx(4 + 1)


def test_statistics_are_float64_and_name_what_they_are_of():
  x = (1e4 + RNG.normal(size=(50, 1))).astype(np.float32)
  s = fid.statistics(x)
  assert s.cov.shape == (1, 1) and s.cov[0, 0] == pytest.approx(x.astype(np.float64).var(ddof=1), rel=1e-9)
  assert s.sha256 == fid.statistics(x.copy()).sha256 != fid.statistics(x[::-1]).sha256
  assert fid.statistics(x, 'pictures').sha256 == 'pictures'
  with pytest.raises(ValueError, match=r'features are \[1, 4\]; a covariance needs'):
    fid.statistics(np.zeros((1, 4)))
  with pytest.raises(ValueError, match='some features are not finite'):
    fid.statistics(np.full((2, 4), np.nan))
  with pytest.raises(ValueError, match='the features have 1 and 4 dimensions'):
    fid.frechet(s, fid.statistics(np.zeros((3, 4))))


def test_resized():
  images = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
  assert fid.resized(images, 0) is images and fid.resized(images, 8) is images
  flat = np.full((1, 8, 8, 3), 77, np.uint8)
  assert (fid.resized(flat, 4) == 77).all() and fid.resized(images, 4).shape == (2, 4, 4, 3)


@pytest.fixture(scope='module')
def network():
  return make_network(0)


def make_network(seed, **fields):
  model = classifier.build('test', labels=3)
  params = runs.parameters(model.init, np.zeros((1, 16, 16, 3), np.float32), seed=seed)['params']
  config = {'objective': 'classifier', 'model': {'variant': 'test', 'labels': 3, **fields}, 'data': {'image_size': 16}}
  return fid.FeatureExtractor(Run(config, {'classifier': params}, None, 5, 'runs/classifier'))


def test_a_network_looks_at_pictures_of_any_size_and_number(network):
  images = RNG.integers(0, 256, (fid.BATCH + 3, 16, 16, 3), np.uint8)
  features, labels = network.features(images), network.labels(images)
  assert features.shape == (fid.BATCH + 3, 8) and labels.shape == (fid.BATCH + 3, 3) and labels.dtype == bool
  np.testing.assert_allclose(network.features(images[-2:]), features[-2:], atol=1e-5)
  larger = images.repeat(2, 1).repeat(2, 2)
  assert network.features(larger).shape == features.shape
  with pytest.raises(ValueError, match="runs/x is a run of 'dalle'; image features need one of inception, "):
    fid.FeatureExtractor(Run({'objective': 'dalle'}, {}, None, 1, 'runs/x'))


def test_features_are_float32_whatever_the_run_is_trained_in(network):
  images = RNG.integers(0, 256, (2, 16, 16, 3), np.uint8)
  found = make_network(0, dtype='bfloat16')
  np.testing.assert_array_equal(found.features(images), network.features(images))
  assert found.sha256 == network.sha256


def test_a_damaged_network_is_refused():
  damaged = make_network(0)
  damaged._params['head']['bias'] = np.full(3, np.nan, np.float32)
  images = np.zeros((2, 16, 16, 3), np.uint8)
  assert np.isfinite(damaged.features(images)).all()  # the head comes after them
  with pytest.raises(ValueError, match='runs/classifier computes values that are not finite; it is damaged'):
    damaged.labels(images)


def test_the_hash_is_of_pictures_resize_and_network_not_of_batches(network, capsys):
  images = RNG.integers(0, 256, (9, 16, 16, 3), np.uint8)

  def seen(network, resize, *parts):
    s = fid.FeatureSet(network, resize)
    for part in parts:
      s.add(part)
    return s

  base = seen(network, 0, images).statistics()
  split = seen(network, 0, images[:4], images[4:]).statistics()
  assert base.sha256 == split.sha256 and fid.frechet(base, split) < 1e-6
  others = seen(network, 8, images), seen(network, 0, images[::-1]), seen(make_network(1), 0, images)
  assert len({base.sha256, *(s.statistics().sha256 for s in others)}) == 4
  report = fid.report(seen(network, 0, images[:7]), seen(network, 0, images))
  assert report['fid'] > 0 and report['fid_reference_sha256'] == base.sha256 and report['fid_pictures'] == [7, 9]
  assert report['fid_network']['step'] == 5 and 'FID of 7 and 9 images with 8 features' in capsys.readouterr().out


def test_saved_statistics_are_read_and_others_refused(network, tmp_path):
  seen = fid.FeatureSet(network)
  seen.add(RNG.integers(0, 256, (3, 16, 16, 3), np.uint8))
  expected = seen.statistics()
  seen.save(tmp_path / 'true.npz', expected)
  found = fid.reference(tmp_path / 'true.npz', network)
  np.testing.assert_array_equal(found.cov, expected.cov)
  assert fid.frechet(found, expected) < 1e-9 and (found.count, found.sha256) == (3, expected.sha256)
  e = network.width
  np.savez(tmp_path / 'plain.npz', mu=np.zeros(e), sigma=np.eye(e))  # as pytorch-fid does
  assert fid.reference(tmp_path / 'plain.npz', network).count == 0
  np.savez(tmp_path / 'lacks.npz', mu=np.zeros(e))
  np.savez(tmp_path / 'shapes.npz', mu=np.zeros(e), sigma=np.eye(e + 1))
  np.savez(tmp_path / 'skew.npz', mu=np.zeros(e), sigma=np.triu(np.ones((e, e))))
  np.savez(tmp_path / 'endless.npz', mu=np.zeros(e), sigma=np.full((e, e), np.inf))
  np.savez(tmp_path / 'complex.npz', mu=np.zeros(e), sigma=np.eye(e) * 1j)
  np.savez(tmp_path / 'small.npz', mu=np.zeros(2), sigma=np.eye(2))
  np.save(tmp_path / 'array.npy', np.zeros(3))
  np.savez_compressed(tmp_path / 'torn.npz', mu=RNG.normal(size=e), sigma=np.eye(e))
  torn = bytearray((tmp_path / 'torn.npz').read_bytes())
  torn[60:90] = b'?' * 30
  (tmp_path / 'torn.npz').write_bytes(torn)
  (tmp_path / 'short.npz').write_bytes(bytes(torn[:100]))
  no, broken, other = 'has no mu and sigma', 'is not a whole .npz file', 'comes from another network or another resize'
  messages = dict(
    lacks=no,
    shapes=r'has mu \[\d+\] and sigma',
    skew='symmetric',
    endless='finite',
    complex=no,
    small=other,
    torn=no,
    short=broken,
  )
  for name, message in messages.items():
    with pytest.raises(ValueError, match=message):
      fid.reference(tmp_path / f'{name}.npz', network)
  with pytest.raises(ValueError, match=broken):
    fid.reference(tmp_path / 'array.npy', network)
  with pytest.raises(ValueError, match=other):
    fid.reference(tmp_path / 'true.npz', network, resize=8)
  with pytest.raises(ValueError, match=other):
    fid.reference(tmp_path / 'true.npz', make_network(1))
  with pytest.raises(FileNotFoundError, match='as pytorch-fid saves them'):
    fid.reference(tmp_path / 'none.npz', network)
