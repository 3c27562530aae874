"""Who is in the frames: F1 over characters, and how many frames have all of them right (Maharana et al., 2022).

What is absent: a class that no frame has and none is said to have is left out of the macro average (its F1 is 0 / 0);
one that no frame has but some are said to have counts as 0 there, and its false alarms count in the micro average.
Where nothing at all is there to find and nothing is claimed, both averages are 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.evals.fid import FeatureExtractor


def f1_by_class(found: np.ndarray, true: np.ndarray) -> np.ndarray:
  """F1 of each class, float64[C] in [0, 1], NaN for one that is in neither of bool[N, C]. Raises as `scores`."""
  _check(found, true)
  hits, claims = (found & true).sum(0), found.sum(0) + true.sum(0)
  return np.where(claims > 0, 2 * hits / np.maximum(claims, 1), np.nan)


def scores(found: np.ndarray, true: np.ndarray, names: Sequence[str] = ()) -> dict[str, float | dict]:
  """What a classifier finds in N frames against what they should show, both bool[N, C].

  Returns, in [0, 1]: 'f1_micro', over all pairs of frame and class; 'f1_macro', the mean over classes;
  'frame_accuracy', the share of frames with every class right; with the `names` of the classes 'f1', by name, None for
  a class that is absent. Raises ValueError for other shapes or dtypes, or no frames.
  """
  each = f1_by_class(found, true)
  hits, claims = int((found & true).sum()), int(found.sum() + true.sum())
  there = each[~np.isnan(each)]
  result: dict[str, float | dict] = {
    'f1_micro': 2 * hits / claims if claims else 1.0,
    'f1_macro': float(there.mean()) if len(there) else 1.0,
    'frame_accuracy': float((found == true).all(1).mean()),
  }
  if names:
    result['f1'] = {n: None if np.isnan(f) else float(f) for n, f in zip(names, each, strict=True)}
  return result


class Tally:
  """What a classifier finds in several sets of pictures of the same N frames, added batch by batch.

  Figures for true frames are the ceiling of those for drawn ones, and say how far the classifier can be trusted.
  """

  def __init__(self, network: FeatureExtractor, names: Sequence[str]):
    """Raises ValueError when the classifier does not know as many labels as there are names."""
    if network.kind != 'classifier' or network.model.labels != len(names):
      known = getattr(network.model, 'labels', 0)
      raise ValueError(
        f'{network.run} knows {known} labels, the data has {len(names)}; give a classifier trained on this data.'
      )
    self.network, self.names = network, tuple(names)
    self._labels: list[np.ndarray] = []
    self._found: dict[str, list[np.ndarray]] = {}

  def add(self, labels: np.ndarray, images: Mapping[str, np.ndarray]) -> list[dict[str, list[str]]]:
    """Adds frames, set -> uint8[n, S, S, 3], with bool[n, C]; returns a dict a frame: 'labels' and 'labels_SET'."""
    self._labels.append(labels)
    tables = {'labels': labels}
    for name, pictures in images.items():
      tables[f'labels_{name}'] = self.network.labels(pictures)
      self._found.setdefault(name, []).append(tables[f'labels_{name}'])
    columns = [named(t, self.names) for t in tables.values()]
    return [dict(zip(tables, row, strict=True)) for row in zip(*columns, strict=True)]

  def report(self) -> dict[str, Any]:
    """'characters_SET': the `scores` of each set of pictures."""
    true = np.concatenate(self._labels)
    return {f'characters_{k}': scores(np.concatenate(v), true, self.names) for k, v in self._found.items()}


def named(labels: np.ndarray, names: Sequence[str]) -> list[list[str]]:
  """bool[N, C] -> the names of the classes that are in each frame. Raises ValueError unless there are C names."""
  return [[name for name, there in zip(names, row, strict=True) if there] for row in labels]


def _check(found: np.ndarray, true: np.ndarray) -> None:
  if found.dtype != bool or true.dtype != bool or found.shape != true.shape or found.ndim != 2 or not len(found):
    raise ValueError(
      f'labels are {found.dtype}{list(found.shape)} and {true.dtype}{list(true.shape)}; expected bool[N, C] of both, '
      'with N of 1 or more.'
    )
