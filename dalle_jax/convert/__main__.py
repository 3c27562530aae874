"""Converts a public checkpoint to a run directory that sample.py, fine-tuning and the pipelines use like any other run.

  python -m dalle_jax.convert --from mindalle --path 1.3B/ --out runs/mindalle
  python -m dalle_jax.convert --from storydalle --path pororo/Model/49.pth --config 1.3B/config.yaml --out runs/pororo
  python -m dalle_jax.convert --from rudalle --path pytorch_model.bin --vqgan runs/sber_vqgan --out runs/malevich
  python -m dalle_jax.convert --from dalle_mini --path dalle-mini/ --vqgan runs/vqgan_f16 --out runs/dalle_mini
No code in a checkpoint is executed, and PyTorch is not needed. `--debug` shows tracebacks.
"""

import dataclasses
import importlib
import inspect
import shutil
import sys
from pathlib import Path

import numpy as np
from absl import flags

from dalle_jax.convert import engine
from dalle_jax.models import image_tokenizer
from dalle_jax.training import checkpoint, errors, host, sharding

SOURCES = sorted(p.stem for p in (Path(__file__).parent / 'sources').glob('*.py') if p.stem != '__init__')
FLAGS = flags.FlagValues()
string = lambda name, text: flags.DEFINE_string(name, '', text, flag_values=FLAGS)
string('from', f'where the checkpoint comes from: {", ".join(SOURCES)}')
string('path', 'the checkpoint: a folder or a file')
string('out', 'the run directory to write')
string('config', 'storydalle: the config.yaml of minDALL-E, if it is not next to the checkpoint')
string('cross', 'storydalle: a file with the cross-attention layers')
string('version', 'rudalle: v3 or v2; min_dalle: mini or mega, where a folder has both')
text = 'rudalle, min_dalle: number of attention heads, if nothing else gives it'
flags.DEFINE_integer('heads', 0, text, 0, flag_values=FLAGS)
string('image_encoder', 'karlo: the image_encoder folder of karlo-v1-alpha-image-variations')
string('vqgan', 'rudalle, dalle_mini, min_dalle, dalle_pytorch: run directory of its image tokenizer')
string('tokenizer', 'dalle_pytorch: tokenizer of captions (.json, .model, or a folder with that of CLIP)')
flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=FLAGS)


def read(source: str, path: str | Path, **options) -> engine.Imported:
  """Reads the checkpoint at `path` with sources/SOURCE.py. Raises ValueError or OSError with a one-line message."""
  if source not in SOURCES:
    raise ValueError(f'--from {source!r} is unknown; there are {", ".join(SOURCES)}.')
  module = importlib.import_module(f'dalle_jax.convert.sources.{source}')
  if unknown := [name for name in options if name not in inspect.signature(module.read).parameters]:
    raise ValueError(f'--from {source} takes no --{unknown[0]}; leave it out.')
  return module.read(Path(path).expanduser(), **options)


def run() -> None:
  source, path, out = FLAGS['from'].value, FLAGS.path, FLAGS.out
  if not source or not path or not out:
    raise ValueError(f'give --from ({", ".join(SOURCES)}), --path CHECKPOINT and --out RUN.')
  out = Path(out).expanduser()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f'{out} already exists; give another --out.')
  host.give_back_memory()
  names = ('config', 'cross', 'version', 'heads', 'image_encoder', 'tokenizer')
  options = {name: getattr(FLAGS, name) for name in names if getattr(FLAGS, name)}
  imported = read(source, path, **options)
  if FLAGS.vqgan:
    imported = _with_vqgan(imported, FLAGS.vqgan)
  notes = list(imported.notes)
  if 'image_vocab' in imported.config['model'] and 'vqgan' not in imported.frozen:
    notes.append('the run has no image tokenizer, so it cannot generate images; give it one with --vqgan RUN')
  partial = out.with_name(f'{out.name}.partial')  # renamed at the end, so that an interrupted write leaves no run
  shutil.rmtree(partial, ignore_errors=True)
  engine.write(imported, partial, f'{source} {path}')
  partial.replace(out)
  for note in notes:
    print(f'note: {note}.')
  count = sum(x.size for x in imported.params.values())
  parts = ', '.join([imported.config['objective'], *imported.frozen])
  print(f'wrote {out}: {parts}, {count:,} parameters{", tokenizer" if imported.tokenizer else ""}')


def _with_vqgan(imported: engine.Imported, path: str) -> engine.Imported:
  """The import with the run `path` as its image tokenizer, in place of the one that it may have.

  Raises ValueError if the model needs other numbers of codes or tokens, or no image tokenizer.
  """
  model = imported.config['model']
  if 'image_vocab' not in model:
    raise ValueError(f'a {imported.config["objective"]} needs no image tokenizer; leave out --vqgan.')
  given, own, notes = _of_run(path), imported.frozen.get('vqgan'), imported.notes
  network, size = image_tokenizer.of_run(given.config), imported.config['data']['image_size']
  found, needed = (network.num_codes, network.grid(size)), (model['image_vocab'], tuple(model['grid']))
  if found != needed:
    describe = lambda codes, grid: f'{grid[0]} x {grid[1]} tokens of {codes} codes'
    raise ValueError(f'{path} has {describe(*found)} for images of {size} pixels; the model needs {describe(*needed)}.')
  ours, theirs = (run.params.get('vqgan/quantize/embedding') if run else None for run in (given, own))
  if own and ours is not None and theirs is not None:
    if ours.shape != theirs.shape:
      raise ValueError(f'{path} has codes of {ours.shape[1]} numbers; the model needs codes of {theirs.shape[1]}.')
    if np.linalg.norm(ours - theirs) > 0.01 * np.linalg.norm(theirs):  # either may be in half precision
      notes = (*notes, f'the codes of {path} are not those of the model; were both trained with the same VQGAN?')
  if given.config['objective'] == 'vqgan' and (own or imported.config['objective'] == 'dalle_mini'):
    # The range of pixel values in which the model's codes were made
    pixels = own.config['model'].get('pixels', 'signed') if own else 'unit'
    given.config['model'] = {**given.config['model'], 'pixels': pixels}
  return dataclasses.replace(imported, frozen={**imported.frozen, 'vqgan': given}, notes=notes)


def _of_run(path: str) -> engine.Imported:
  loaded = checkpoint.load_run(path)
  if loaded.config.get('objective') not in image_tokenizer.TOKENIZERS:
    raise ValueError(
      f'{path} is a run of {loaded.config.get("objective")!r}; --vqgan needs a run of an image tokenizer.'
    )
  return engine.Imported(loaded.config, sharding.flatten(loaded.params), loaded.axes)


def main(argv: list[str]) -> int:
  return errors.command(argv, FLAGS, run, __doc__, 'a checkpoint needs --path.')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
