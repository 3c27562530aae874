"""Time and peak memory of importing a minDALL-E of the real size.

  python benchmarks/import_size.py --dir /tmp/mindalle   # 1.3e9 random weights: 11 GB on disk
The files are written without PyTorch, in the layout of torch 1.6 and later: an archive with one record per tensor. The
import runs in a separate process, whose peak memory is read from `ru_maxrss`.
"""

import collections
import io
import json
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
from absl import app, flags

_DIR = flags.DEFINE_string('dir', '', 'folder for the files; existing files are reused')
_DEPTH = flags.DEFINE_integer('depth', 42, 'number of layers', 1)
_WIDTH = flags.DEFINE_integer('width', 1536, 'width of the transformer', 64)
VQGAN = dict(
  double_z=False, z_channels=256, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 1, 2, 2, 4],
  num_res_blocks=2, attn_resolutions=[16], pdrop=0.0,
)  # fmt: skip
TEXT_VOCAB, CODES, TEXT, IMAGE = 16_384, 16_384, 64, 256


class Name:
  """Pickles as the global MODULE.NAME, whose package need not be installed."""

  def __init__(self, module: str, name: str):
    self.module, self.name = module, name


class Pickler(pickle._Pickler):
  """Pickles names as globals, and tensors as torch does: a call of _rebuild_tensor_v2 on a storage."""

  def save(self, value, save_persistent_id=True):
    if isinstance(value, Name):
      self.write(b'c' + f'{value.module}\n{value.name}\n'.encode())
    elif isinstance(value, Tensor):
      self.save(Name('torch._utils', '_rebuild_tensor_v2'))
      self.write(b'(')
      super().save(value.storage)
      for part in (0, value.shape, value.strides, False):
        self.save(part)
      self.save(Name('collections', 'OrderedDict'))
      self.write(b')R')
      self.write(b'tR')
    else:
      super().save(value, save_persistent_id)

  def persistent_id(self, value):
    if isinstance(value, Storage):
      return ('storage', Name('torch', 'FloatStorage'), value.key, 'cuda:0', value.count)
    return None


Storage = collections.namedtuple('Storage', 'key count')


class Tensor:
  def __init__(self, key: str, shape: tuple[int, ...]):
    self.shape, self.storage = shape, Storage(key, int(np.prod(shape)))
    self.strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
  """Writes a state_dict of random weights."""
  text, rng = io.BytesIO(), np.random.default_rng(0)
  tensors = {name: Tensor(str(i), shape) for i, (name, shape) in enumerate(shapes.items())}
  Pickler(text, protocol=2).dump({'state_dict': tensors})
  with zipfile.ZipFile(path, 'w') as archive:  # uncompressed, as torch does
    archive.writestr('archive/data.pkl', text.getvalue())
    for tensor in tensors.values():
      with archive.open(f'archive/data/{tensor.storage.key}', 'w', force_zip64=True) as record:
        left = tensor.storage.count
        while left:
          count = min(left, 2**22)
          record.write((rng.standard_normal(count, np.float32) * 0.02).tobytes())
          left -= count
    archive.writestr('archive/version', '3\n')


def transformer(depth: int, d: int) -> dict[str, tuple[int, ...]]:
  shapes = {'tok_emb_img.weight': (CODES, d), 'tok_emb_txt.weight': (TEXT_VOCAB, d)}
  shapes |= {'pos_emb_img.weight': (IMAGE, d), 'pos_emb_txt.weight': (TEXT, d)}
  for i in range(depth):
    block = {'ln1.weight': (d,), 'ln1.bias': (d,), 'ln2.weight': (d,), 'ln2.bias': (d,)}
    for name in ('key', 'query', 'value', 'proj'):
      block |= {f'attn.{name}.weight': (d, d), f'attn.{name}.bias': (d,)}
    block |= {'mlp.0.weight': (4 * d, d), 'mlp.0.bias': (4 * d,), 'mlp.2.weight': (d, 4 * d), 'mlp.2.bias': (d,)}
    shapes |= {f'blocks.{i}.{k}': v for k, v in block.items()}
  shapes |= {'ln_f.weight': (d,), 'ln_f.bias': (d,), 'head_img.weight': (CODES, d), 'head_txt.weight': (TEXT_VOCAB, d)}
  return shapes


def vqgan() -> dict[str, tuple[int, ...]]:
  """Shapes in their layout, from the inverse of our import table."""
  from dalle_jax.convert.sources import taming

  model = taming.fields(Path('config.yaml'), VQGAN, 256, CODES)
  network = taming.network(model)
  shapes = {}
  for row in taming.rows(list(network.shapes), gumbel=False):
    shape = tuple(network.shapes[row.ours].shape)
    shapes[row.theirs[0][0]] = (shape[3], shape[2], *shape[:2]) if row.ours.endswith('kernel') else shape
  return shapes


def make(folder: Path, depth: int, width: int) -> None:
  (folder / 'tokenizer').mkdir(parents=True, exist_ok=True)
  letters = [chr(c) for c in range(33, 127)]
  vocab = {w: i for i, w in enumerate(['[PAD]', '[UNK]', *letters, *(f'{c}</w>' for c in letters)])}
  vocab |= {f'unused{i}': i for i in range(len(vocab), TEXT_VOCAB)}
  (folder / 'tokenizer' / 'bpe-16k-vocab.json').write_text(json.dumps(vocab))
  (folder / 'tokenizer' / 'bpe-16k-merges.txt').write_text('#version: 0.2\n')
  hparams = dict(embed_dim=width, n_layers=depth, n_heads=width // 64, ctx_len_img=IMAGE, ctx_len_txt=TEXT)
  config = dict(
    stage1=dict(embed_dim=256, n_embed=CODES, hparams=VQGAN),
    stage2=dict(vocab_size_txt=TEXT_VOCAB, vocab_size_img=CODES, hparams=hparams),
  )
  (folder / 'config.yaml').write_text(json.dumps(config))  # JSON is YAML
  write(folder / 'stage1_last.ckpt', vqgan())
  write(folder / 'stage2_last.ckpt', transformer(depth, width))


def main(argv):
  if len(argv) > 1 or not _DIR.value:
    sys.exit('error: give --dir FOLDER, on a disk with 11 GB free')
  folder, out = Path(_DIR.value) / '1.3B', Path(_DIR.value) / 'run'
  if not (folder / 'stage2_last.ckpt').is_file():
    make(folder, _DEPTH.value, _WIDTH.value)
  shutil.rmtree(out, ignore_errors=True)
  start = time.monotonic()
  command = ['-m', 'dalle_jax.convert', '--from=mindalle', f'--path={folder}', f'--out={out}']
  code = subprocess.run([sys.executable, *command], check=False).returncode
  seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  print(f'import: {seconds:.0f} s (limit 180), peak memory {peak:.1f} GiB (limit 12), exit code {code}')
  sys.exit(code)


if __name__ == '__main__':
  app.run(main)
