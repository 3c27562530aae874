"""The Inception-v3 of published FIDs, from the file of mseitzer/pytorch-fid (and toshas/torch-fidelity).

File: pt_inception-2015-12-05-6726825d.pth, or a folder that has it. torchvision's Inception-v3 has the same layer names
but 1,000 classes instead of 1,008, and other weights; it is refused.
"""

from pathlib import Path

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, conv, convert, named, row, same
from dalle_jax.models import inception

EXPECTED = 'pt_inception-2015-12-05-6726825d.pth'
CLASSES = 1_008
LEAVES = {
  'conv/kernel': ('conv.weight', conv),
  'bn/scale': ('bn.weight', same),
  'bn/bias': ('bn.bias', same),
  'bn/mean': ('bn.running_mean', same),
  'bn/var': ('bn.running_var', same),
}
IGNORED = (r'fc\.(weight|bias)', r'.*\.num_batches_tracked')


def read(path: Path) -> Imported:
  """Reads the network without its classifier. Raises ValueError or OSError with a one-line message."""
  file = files.find(path, 'pt_inception*.pth', 'weights-inception*.pth', expected=EXPECTED)
  theirs = files.state_dict(file)
  head, first = theirs.get('fc.weight'), theirs.get('Conv2d_1a_3x3.conv.weight')
  if head is not None and head.shape[0] != CLASSES:
    raise ValueError(
      f'{file} has {head.shape[0]} classes, like that of torchvision; FID needs {EXPECTED}, which has {CLASSES}.'
    )
  model = dict(variant='fid', shrink=max(1, 32 // first.shape[0]) if first is not None else 1)
  ours = ModuleSpec.of(inception.build(**model), (1, 299, 299, 3))
  table = []
  for name in ours.shapes:
    layer, kind, leaf = name.rsplit('/', 2)
    theirs_leaf, op = LEAVES[f'{kind}/{leaf}']
    table.append(row(name, f'{layer.replace("/", ".")}.{theirs_leaf}', op))
  params = convert(str(file), table, theirs, ours.shapes, IGNORED)
  return Imported({'objective': 'inception', 'model': model}, named('inception', params), named('inception', ours.axes))
