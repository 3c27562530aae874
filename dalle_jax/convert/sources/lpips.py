"""LPIPS as in taming-transformers: torchvision's VGG16 and five linear maps (Zhang et al., 2018).

Files, in one folder: vgg16.pth (torchvision's state_dict; its name has to begin with vgg16) and vgg.pth (linear maps).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, conv2d, convert, named, row
from dalle_jax.models import lpips

EXPECTED = 'a folder with vgg16.pth (torchvision) and vgg.pth (the linear maps of LPIPS)'
DEPTHS = (2, 2, 3, 3, 3)  # convolutions per stage of VGG16
IGNORED = (r'classifier\..*', r'scaling_layer\..*')


def numbers() -> list[list[int]]:
  """Indices of the convolutions in torchvision's `features`, by stage: a ReLU follows each one, a pool each stage."""
  at, stages = 0, []
  for depth in DEPTHS:
    stages.append([at + 2 * i for i in range(depth)])
    at += 2 * depth + 1
  return stages


def of_tensors(source: str, theirs: Mapping[str, Any], convolution: str) -> Imported:
  """Converts the tensors; `convolution` is a convolution's name, with {stage} from 1 and its index {i} in VGG16."""
  table, widths = [], []
  for stage, where in enumerate(numbers()):
    names = [convolution.format(stage=stage + 1, i=i) for i in where]
    for i, name in enumerate(names):
      table += conv2d(f'conv_{stage}_{i}', name)
    table.append(row(f'lin_{stage}', f'lin{stage}.model.1.weight'))
    first = theirs.get(f'{names[0]}.weight')
    widths.append(first.shape[0] if first is not None else 1)
  model = dict(variant='vgg16', widths=tuple(widths), depths=DEPTHS)
  ours = ModuleSpec.of(lpips.build(**model), (1, 32, 32, 3), (1, 32, 32, 3))
  params = convert(source, table, theirs, ours.shapes, IGNORED)
  return Imported({'objective': 'lpips', 'model': model}, named('lpips', params), named('lpips', ours.axes))


def read(path: Path) -> Imported:
  """Reads both files. Raises ValueError or OSError with a one-line message."""
  features = files.find(path, 'vgg16*.pth', 'vgg16*.safetensors', expected=EXPECTED)
  maps = files.find(features.parent, 'vgg.pth', 'lin*.pth', expected=EXPECTED)
  theirs = {**files.state_dict(features), **files.state_dict(maps)}
  return of_tensors(f'{features} with {maps.name}', theirs, 'features.{i}')
