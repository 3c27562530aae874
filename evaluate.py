"""Scores a trained model on a held-out split: continued stories, images for captions, reconstructions, or retrieval.

  python evaluate.py --run runs/quickstart/story --split test_unseen --count 200     # a StoryDALL-E or StoryGANc
  python evaluate.py --run runs/quickstart/dalle --clip runs/quickstart/clip --n 8   # a DALL-E (mini); the best of 8
  python evaluate.py --run runs/mine/vqgan --split val --inception runs/inception    # an image tokenizer
  python evaluate.py --run runs/quickstart/clip --split val                          # a CLIP
  python evaluate.py --run IMPORTED --source folder --path IMAGES --split all --inception runs/inception
  python evaluate.py --run RUN --path DATA --classifier RUN --resize 64 --out results/pororo
Writes OUT/pictures/NUMBER.png, OUT/grid.png (the first ones), OUT/predictions.json (a row for each image) and
OUT/metrics.json when everything is done, in place of an earlier evaluation. True images are cropped and resized to the
size of the model before anything is compared. Images, scores and the sha256 of the reference are a function of data,
runs and flags.

Scores: for the procedural worlds, what an oracle reads; the FID to the true images or to --fid_reference (a .npz of
pytorch-fid, or the true.npz that --save_true writes next to true/), by --inception (as in published figures), or else
by --classifier or --clip; with --clip the mean cosine similarity of captions and images, both generated and true; with
--classifier and labels, the characters in generated and in true images (the ceiling); for reconstructions PSNR, L1, the
codes in use and, with --lpips or an LPIPS in the run, LPIPS. A DALL-E or DALL-E mini gets the first caption of each
record. Published StoryDALL-E figures resize to 64 pixels before the FID (--resize 64): compare FIDs only where
metrics.json gives the same network, resize and reference. The FID by the CLIP that picked the images flatters them.

A CLIP gets the first caption of each record, too: metrics.json has R@1, R@5 and R@10 from text to image and from image
to text among all evaluated records, where records with the same caption count as correct for each other;
predictions.json has the ranks, and grid.png the nearest images of the first captions.
"""

import ast
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import common
from dalle_jax.data import sources
from dalle_jax.evals import evaluation as evaluation_lib
from dalle_jax.evals import fid
from dalle_jax.evals.captions import Captions
from dalle_jax.evals.evaluation import Evaluation, Settings
from dalle_jax.evals.reconstructions import Reconstructions
from dalle_jax.evals.retrieval import Retrieval
from dalle_jax.evals.stories import Stories
from dalle_jax.models import image_tokenizer
from dalle_jax.pipelines import options
from dalle_jax.pipelines.generator import Generator
from dalle_jax.pipelines.image_tokenizer import ImageTokenizer
from dalle_jax.pipelines.rerank import Reranker
from dalle_jax.pipelines.stories import StoryGenerator
from dalle_jax.training import checkpoint, distributed, errors, layout

FLAGS = flags.FlagValues()
string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=FLAGS)
integer = lambda name, default, text, low=0: flags.DEFINE_integer(name, default, text, low, flag_values=FLAGS)
string('run', '', 'run directory of a DALL-E, DALL-E mini, unCLIP, StoryDALL-E, StoryGANc, VQGAN, dVAE or CLIP')
string('split', 'test', 'split of the data; all: every image of a folder or of tars')
string('source', '', 'data other than those of training, e.g. pororo; with --path')
string('path', '', 'where the data are, if not where they were in training')
text = 'NAME=VALUE, an argument of the source, e.g. val_stories=6; may be repeated'
flags.DEFINE_multi_string('source_arg', [], text, flag_values=FLAGS)
string('inception', '', 'run directory of an imported Inception-v3: FID as published')
string('classifier', '', 'run directory of a classifier: FID by its features, characters')
string('clip', '', 'run directory of a CLIP: ranks candidates, CLIP score, FID by its embeddings')
string('lpips', '', 'run directory of an imported LPIPS, for reconstructions')
integer('count', 0, 'evaluate only this many records, the first ones; 0: all')
integer('n', 1, 'candidates per image, of which CLIP picks the best', 1)
options.define_flags(FLAGS)
integer('resize', 0, "side in pixels that images are brought to before the FID; 0: the network's own")
string('fid_reference', '', 'a .npz of statistics (mu, sigma), as pytorch-fid saves them: FID to these')
integer('image_size', 0, 'size of reconstructions; 0: that of training')
string('out', 'evaluation', 'output directory; an earlier evaluation in it is replaced')
text = 'also write the true images, as they are compared (OUT/true/), and their statistics for the FID (OUT/true.npz)'
flags.DEFINE_bool('save_true', False, text, flag_values=FLAGS)
layout.define_flags(FLAGS)
flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=FLAGS)
COUNTS = {'records', 'pictures', 'skipped', 'skipped_records'}  # metrics that are not scores
# Flags of models that generate images
SAMPLING = ('n', 'seed', *options.SAMPLING, 'int8', *options.PARTS, *options.DIFFUSION)
# Flags of models that make images, by sampling or by reconstruction
IMAGES = (*fid.KINDS, 'save_true')
# Flags in metrics.json
SETTINGS = ('run', 'split', 'count', 'resize', 'fid_reference', *fid.KINDS, 'lpips', 'n', 'seed')
# How messages about a config name a field of the data, and how this script does
CONFIG_FIELDS = (
  (r'(, or )?set config\.data\.val_split=""[^.;]*', ''),  # advice for training
  (r'config\.data\.val_split="(\w+)"', r'--split \1'),
  (r'config\.data has the split', 'there is no split'),
  (r'(config\.data\.)?source_args[. ]', '--source_arg '),
  (r'config\.data\.(source|path)\b', r'--\1'),
)


def run() -> None:
  if not FLAGS.run:
    raise ValueError('give --run RUN_DIR, the run directory of a trained model.')
  for name in ('resize', 'fid_reference'):
    if getattr(FLAGS, name) and not any(getattr(FLAGS, kind) for kind in fid.KINDS):
      raise ValueError(f'--{name} is for the FID; give --inception or another network, or leave it out.')
  out = Path(FLAGS.out).expanduser()
  evaluation_lib.check_out(out)
  evaluation_lib.check_kept(out, inputs())
  with layout.asked(FLAGS, common.MESHES['data'], common.RULES) as where:
    score(where, out)


def inputs() -> Iterator[tuple[str, str]]:
  """The paths in flags, each as (flag, path)."""
  for name in ('run', 'path', 'fid_reference', *fid.KINDS, 'lpips', *options.PARTS):
    value = FLAGS[name].value
    yield from ((f'--{name}', path) for path in ([value] if isinstance(value, str) else value))


def score(where: dict[str, Any], out: Path) -> None:
  model, kind = load(where)
  try:
    data = data_of(model)
    evaluation_lib.check_kept(out, [('the data', data.path)])
    source = sources.load(data, FLAGS.split)
  except (ValueError, OSError) as e:
    raise ValueError(in_flags(str(e))) from e
  for line in source.report() if hasattr(source, 'report') else []:
    print(f'{FLAGS.split}: {line}', flush=True)
  distributed.check_same({'data': f'{data.to_json()} {len(source)}', 'checkpoint': str(model.step)})
  evaluation = kind(model, source, settings_of(model, source))
  print(f'devices: {jax.device_count()} x {jax.devices()[0].device_kind}', flush=True)
  with evaluation_lib.in_place_of(out) as partial:
    evaluation.run(partial, FLAGS.count)
    metrics = evaluation.metrics()
    checkpoint.write_json(
      partial / 'metrics.json', {'settings': written_settings(model, data, evaluation.settings), **metrics}
    )
  print('\n'.join(f'{k}: {v}' for k, v in metrics.items() if k != 'skipped_records'))
  if not evaluation.settings.network and not set(metrics) - COUNTS:
    print('nothing here scores these images: give --inception or --clip.')
  if jax.process_index() == 0:
    print(f'wrote {", ".join(sorted(p.name for p in out.iterdir()))} to {out}')


def written_settings(model: Any, data: ConfigDict, settings: Settings) -> dict[str, Any]:
  """What metrics.json says of the checkpoint, the data and the flags."""
  written = {k: FLAGS[k].value for k in FLAGS if k in SETTINGS}
  if isinstance(model, Generator):
    written |= options.sampling_arguments(FLAGS, model)
  written |= {'source': data.source, 'path': data.path, 'source_args': data.source_args.to_dict()}
  return written | {'step': model.step, 'image_size': model.image_size, 'batch_size': settings.batch_size}


def in_flags(message: str) -> str:
  """An error message about fields of a config, in terms of the flags of this script."""
  for pattern, replacement in CONFIG_FIELDS:
    message = re.sub(pattern, replacement, message)
  return message


def load(where: dict[str, Any]) -> tuple[Any, type[Evaluation]]:
  """The pipeline of the run, and what evaluates it. Raises ValueError for flags that it has no use for."""
  objective = checkpoint.read_config(FLAGS.run).get('objective')
  step, tokenizes = FLAGS.step or None, objective in image_tokenizer.TOKENIZERS
  if not tokenizes and (given := options.changed(FLAGS, 'lpips', 'image_size')):
    raise ValueError(f'--{", --".join(given)} is for reconstructions by an image tokenizer; leave it out.')
  if tokenizes:
    if given := options.changed(FLAGS, *SAMPLING):
      raise ValueError(f'{FLAGS.run} is an image tokenizer, which samples nothing; leave out --{", --".join(given)}.')
    if FLAGS.clip and (others := options.changed(FLAGS, 'inception', 'classifier')):
      raise ValueError(f'an image tokenizer has no use for --clip in addition to --{others[0]}; leave out one of them.')
    return ImageTokenizer.load(FLAGS.run, image_size=FLAGS.image_size, step=step, **where), Reconstructions
  if objective == 'clip':
    if given := options.changed(FLAGS, *SAMPLING, *IMAGES):
      raise ValueError(f'{FLAGS.run} is a CLIP, which makes no images; leave out --{", --".join(given)}.')
    return Reranker.load(FLAGS.run, step=step, **where), Retrieval
  if FLAGS.n > 1 and not FLAGS.clip:
    raise ValueError(f'--n {FLAGS.n} needs --clip RUN_DIR, which picks the best of the candidates.')
  model = options.load(FLAGS, where)
  return model, Stories if isinstance(model, StoryGenerator) else Captions


def data_of(model: Any) -> ConfigDict:
  """The source, path and arguments of the data: those of --source, or else those of training.

  Story models get stories, other models their frames one by one. Raises ValueError when there are no data.
  """
  trained = model.config['data']
  kind = FLAGS.source or trained.get('source', '')
  if not kind:
    raise ValueError(f'{FLAGS.run} was imported, without data; give them, e.g. --source folder --path DATA.')
  if kind == 'tokens':
    raise ValueError('the data source tokens has no images; give data that has, e.g. --source folder --path DATA.')
  same = kind == trained.get('source')
  args = {k: v for k, v in trained.get('source_args', {}).items() if same and k != 'unit'}
  if not isinstance(model, StoryGenerator) and sources.takes(kind, 'unit'):
    args['unit'] = 'frame'
  for text in FLAGS.source_arg:
    name, equals, value = text.partition('=')
    if not equals or not name.isidentifier():
      raise ValueError(f'--source_arg {text!r} is not understood; write NAME=VALUE.')
    args[name] = literal(value)
  path = FLAGS.path or (trained.get('path', '') if same else '')
  return ConfigDict(dict(source=kind, path=path, source_args=args))


def literal(text: str) -> Any:
  """A number, a bool or a tuple as Python writes it, else the text itself."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, TypeError, ValueError):
    return text


def settings_of(model: Any, source: Any) -> Settings:
  """How to sample and score, as the flags say. Raises ValueError for networks of the wrong kind or without a use."""
  paths = {kind: getattr(FLAGS, kind) for kind in fid.KINDS if getattr(FLAGS, kind)}
  of_fid = next(iter(paths), '')  # the first one given, in the order of fid.KINDS
  networks = {}
  for kind in dict.fromkeys([of_fid, 'classifier']):
    if kind in paths:
      networks[kind] = fid.FeatureExtractor.load(paths[kind], model.mesh)
      if networks[kind].kind != kind:
        raise ValueError(f'--{kind} {paths[kind]} is a run of {networks[kind].kind!r}.')
  if 'classifier' in networks and of_fid != 'classifier' and not getattr(source, 'label_names', ()):
    raise ValueError(f'--classifier predicts labels, which {FLAGS.source or "the data"} does not have; leave it out.')
  reference = None
  if FLAGS.fid_reference:
    reference = fid.reference(FLAGS.fid_reference, networks[of_fid], FLAGS.resize)
  return Settings(
    n=FLAGS.n,
    seed=FLAGS.seed,
    batch_size=FLAGS.batch_size or model.BATCH,
    sampling=options.sampling(FLAGS, model) if isinstance(model, Generator) else {},
    resize=FLAGS.resize,
    save_true=FLAGS.save_true,
    network=networks.get(of_fid),
    labels=networks.get('classifier'),
    reference=reference,
    lpips=lpips_of(model) if isinstance(model, ImageTokenizer) else None,
  )


def lpips_of(model: ImageTokenizer) -> checkpoint.Run | None:
  """The LPIPS of --lpips, or that of the run if it has one."""
  path = FLAGS.lpips or model.frozen.get('lpips')
  if not path:
    return None
  found = checkpoint.load_run(path, mesh=model.mesh)
  if found.config.get('objective') != 'lpips':
    raise ValueError(f'{path} is a run of {found.config.get("objective")!r}; --lpips takes an imported LPIPS.')
  return found


def main(argv: list[str]) -> int:
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
  stopped = 'stopped; nothing of this evaluation is kept.'
  return errors.command(argv, FLAGS, run, __doc__, 'flags look like --run RUN --split test.', stopped)


if __name__ == '__main__':
  errors.leave(main(sys.argv))
