"""Any image data set of TensorFlow Datasets, read without TensorFlow (`pip install -e ".[tfds]"`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle_jax.data import sources

SPLITS = {'val': 'validation'}  # our names of splits -> those of the catalogue


def _field(record: Any, name: str) -> Any:
  """Looks 'a.b' up in nested dicts. Raises KeyError that names the fields there are."""
  for part in name.split('.'):
    if not isinstance(record, Mapping) or part not in record:
      there = ', '.join(record) if isinstance(record, Mapping) else type(record).__name__
      raise KeyError(f'no field {name!r}; there are {there}')
    record = record[part]
  return record


def _text(value: Any) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class Tfds:
  """Random-access source: `{'image': bytes of the file, 'caption': str, 'captions': list[str]}`."""

  dataset: str
  split: str
  records: Any = dataclasses.field(repr=False)
  image_field: str = 'image'
  caption_field: str = 'caption'
  labels: Any = dataclasses.field(default=None, repr=False)  # int -> str, where the caption is a class label

  def __len__(self) -> int:
    return len(self.records)

  def name(self, index: int) -> str:
    return f'{self.dataset} {self.split} {index}'

  def __getitem__(self, index: int) -> dict:
    record = self.records[index]
    value = _field(record, self.caption_field)
    return {'image': _field(record, self.image_field), **sources.caption_fields(lambda: self._captions(value))}

  def _captions(self, value: Any) -> list[str]:
    if self.labels:
      return [self.labels(int(value)).replace('_', ' ')] if value >= 0 else []  # -1 where the label is not public
    return [_text(v) for v in ([value] if isinstance(value, (bytes, str)) else value)]


def load(split: str, *, name: str, path: str = '', image_field: str = 'image', caption_field: str = 'caption') -> Tfds:
  """A split of data set `name` of the catalogue, downloaded to `path` (default: ~/tensorflow_datasets) if necessary.

  Names of fields may be dotted ('captions.text'). If the data set has no `caption_field`, the names of its `label` are
  the captions. The split val is its validation; where there is none, use slices: config.data.split='train[5%:]' and
  config.data.val_split='train[:5%]'. Raises ValueError, one line, when the package, the data set, the split or a field
  is missing.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as e:
    raise ValueError(f'config.data.source tfds:{name} needs a package: pip install -e ".[tfds]" ({e}).') from e
  split = SPLITS.get(split, split)
  try:
    builder = tfds.builder(name, data_dir=path or None, file_format='array_record')
    builder.download_and_prepare()
    features = builder.info.features
    decoders = {image_field: tfds.decode.SkipDecoding()} if image_field in features else None  # our own ops decode
    records = builder.as_data_source(split, decoders=decoders)
  except Exception as e:  # of many classes, with messages of many lines
    raise ValueError(
      f'the data set tfds:{name}, split {split!r}, cannot be read: {" ".join(str(e).split())[:300]}'
    ) from e
  if not len(records):
    raise ValueError(f'tfds:{name} has no records in the split {split!r}.')
  if caption_field.split('.')[0] not in records[0] and 'label' in records[0]:
    caption_field = 'label'
  labels = getattr(features[caption_field], 'int2str', None) if caption_field in features else None
  source = Tfds(name, split, records, image_field, caption_field, labels)
  try:
    source[0]
  except KeyError as e:
    raise ValueError(f'tfds:{name}: {e.args[0]}; set config.data.source_args image_field and caption_field.') from e
  return source
