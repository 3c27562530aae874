"""Which characters are in the frames: F1 over characters, and frame accuracy (Maharana et al., 2022).

Absent classes: a class that is neither in a frame nor predicted for one is left out of the macro average (its F1 is
0 / 0). A class that is in no frame but is predicted for some counts as 0 there, and its false positives count in the
micro average. When no frame has a class and none is predicted, both averages are 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.evals.fid import FeatureExtractor


def f1_by_class(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
  """F1 of each class, float64[C] in [0, 1], of two bool[N, C]; NaN for a class in neither. Raises as `scores`."""
  _check(predicted, true)
  hits, total = (predicted & true).sum(0), predicted.sum(0) + true.sum(0)
  return np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)


def scores(predicted: np.ndarray, true: np.ndarray, names: Sequence[str] = ()) -> dict[str, float | dict]:
  """Compares the labels that a classifier predicts for N frames with the true ones, both bool[N, C].

  Returns, in [0, 1]: 'f1_micro', over all pairs of frame and class; 'f1_macro', the mean over classes;
  'frame_accuracy', the share of frames with every class right; and, given the `names` of the classes, 'f1' by name,
  None for an absent class. Raises ValueError for other shapes or dtypes, or no frames.
  """
  by_class = f1_by_class(predicted, true)
  hits, total = int((predicted & true).sum()), int(predicted.sum() + true.sum())
  present = by_class[~np.isnan(by_class)]
  result: dict[str, float | dict] = {
    'f1_micro': 2 * hits / total if total else 1.0,
    'f1_macro': float(present.mean()) if len(present) else 1.0,
    'frame_accuracy': float((predicted == true).all(1).mean()),
  }
  if names:
    result['f1'] = {n: None if np.isnan(f) else float(f) for n, f in zip(names, by_class, strict=True)}
  return result


class Tally:
  """The labels that a classifier predicts for several sets of images of the same N frames, added batch by batch.

  The scores of true frames are the ceiling of those of generated ones, and show how reliable the classifier is.
  """

  def __init__(self, network: FeatureExtractor, names: Sequence[str]):
    """Raises ValueError when the classifier does not have as many labels as there are names."""
    if network.kind != 'classifier' or network.model.labels != len(names):
      known = getattr(network.model, 'labels', 0)
      raise ValueError(
        f'{network.run} has {known} labels and the data {len(names)}; give a classifier trained on these data.'
      )
    self.network, self.names = network, tuple(names)
    self._labels: list[np.ndarray] = []
    self._predicted: dict[str, list[np.ndarray]] = {}

  def add(self, labels: np.ndarray, images: Mapping[str, np.ndarray]) -> list[dict[str, list[str]]]:
    """Adds n frames with their labels bool[n, C] and `images` uint8[n, S, S, 3] by set.

    Returns for each frame the names of its 'labels' and, for every set, of its 'labels_SET'.
    """
    self._labels.append(labels)
    tables = {'labels': labels}
    for name, frames in images.items():
      tables[f'labels_{name}'] = self.network.labels(frames)
      self._predicted.setdefault(name, []).append(tables[f'labels_{name}'])
    columns = [named(t, self.names) for t in tables.values()]
    return [dict(zip(tables, row, strict=True)) for row in zip(*columns, strict=True)]

  def report(self) -> dict[str, Any]:
    """'characters_SET': the `scores` of each set of images."""
    true = np.concatenate(self._labels)
    return {f'characters_{k}': scores(np.concatenate(v), true, self.names) for k, v in self._predicted.items()}


def named(labels: np.ndarray, names: Sequence[str]) -> list[list[str]]:
  """bool[N, C] -> the names of the classes in each frame. Raises ValueError unless there are C names."""
  return [[name for name, present in zip(names, row, strict=True) if present] for row in labels]


def _check(predicted: np.ndarray, true: np.ndarray) -> None:
  fits = predicted.dtype == bool and true.dtype == bool and predicted.shape == true.shape and predicted.ndim == 2
  if not fits or not len(predicted):
    given = f'{predicted.dtype}{list(predicted.shape)} and {true.dtype}{list(true.shape)}'
    raise ValueError(f'labels are {given}; expected bool[N, C] for both, with N of 1 or more.')
