"""Scores a trained model on a held-out split: continued stories, pictures for captions, or reconstructions.

  python evaluate.py --run runs/quickstart/story --split test_unseen --count 200     # a StoryDALL-E or StoryGANc
  python evaluate.py --run runs/quickstart/dalle --clip runs/quickstart/clip --n 8   # a DALL-E; the best of 8 is scored
  python evaluate.py --run runs/mine/vqgan --split val --inception runs/inception    # an image tokenizer
  python evaluate.py --run IMPORTED --source folder --path PICTURES --split all --inception runs/inception
  python evaluate.py --run RUN --path DATA --classifier RUN --resize 64 --out results/pororo
Writes OUT/pictures/NUMBER.png, OUT/grid.png (the first ones), OUT/predictions.json (a row a picture) and
OUT/metrics.json, once all is done, in place of an earlier evaluation. True pictures are cropped and brought to the size
of the model before anything is compared. Pictures, scores and the sha256 of the reference are a
function of data, runs and flags. Scores: what an oracle reads, for the procedural worlds; the FID to the true pictures
or to --fid_reference (a .npz of pytorch-fid, or the true.npz that --save_true writes beside true/), through
--inception (as published ones), or else through --classifier or --clip; with --clip the mean cosine of captions
and pictures, drawn and true ones; with --classifier and labels the characters, for drawn and for true pictures (the
ceiling); of reconstructions PSNR, L1, the codes in use and, with --lpips or one in the run, LPIPS. A DALL-E draws for
the first caption of each record. Published StoryDALL-E figures resize to 64 pixels before FID (--resize 64): compare
FIDs only where metrics.json has the same network, resize and reference beside them. The FID by the CLIP that picked the
pictures flatters them.
"""

import ast
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import common
from dalle_jax.data import sources
from dalle_jax.evals import captions, fid, reconstructions, split, stories
from dalle_jax.models import image_tokenizer
from dalle_jax.pipelines import options
from dalle_jax.pipelines.image_tokenizer import ImageTokenizer
from dalle_jax.pipelines.stories import StoryGenerator
from dalle_jax.training import checkpoint, distributed, errors, layout

FLAGS = flags.FlagValues()
string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=FLAGS)
integer = lambda name, default, text, low=0: flags.DEFINE_integer(name, default, text, low, flag_values=FLAGS)
string('run', '', 'run directory of a DALL-E, unCLIP, StoryDALL-E, StoryGANc, VQGAN or dVAE')
string('split', 'test', 'of the data; all: every picture of a folder or of tars')
string('source', '', 'data other than what the run was trained on, e.g. pororo; with --path')
string('path', '', 'where the data is, if not where it was in training')
text = 'NAME=VALUE, an argument of the source, e.g. val_stories=6; may be repeated'
flags.DEFINE_multi_string('source_arg', [], text, flag_values=FLAGS)
string('inception', '', 'run directory of an imported Inception-v3: FID as published')
string('classifier', '', 'run directory of a classifier: FID by its features, characters')
string('clip', '', 'run directory of a CLIP: ranks candidates, CLIP score, FID by its embeddings')
string('lpips', '', 'run directory of an imported LPIPS, for reconstructions')
integer('count', 0, 'only the first records; 0: all')
integer('n', 1, 'candidates a picture, of which CLIP picks the best', 1)
options.define_flags(FLAGS)
integer('resize', 0, "side in pixels that pictures are brought to before FID; 0: the network's own")
string('fid_reference', '', 'a .npz of statistics (mu, sigma), as pytorch-fid saves them: FID to these')
integer('image_size', 0, 'of reconstructions; 0: that of training')
string('out', 'evaluation', 'directory for what is written; an earlier evaluation there is replaced')
text = 'the true pictures, too, as they are compared (OUT/true/), and their statistics for a FID (OUT/true.npz)'
flags.DEFINE_bool('save_true', False, text, flag_values=FLAGS)
layout.define_flags(FLAGS)
flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=FLAGS)
COUNTS = {'records', 'pictures', 'skipped', 'skipped_records'}  # of metrics that are no scores
# flags of models that draw
DRAWING = ('clip', 'n', 'seed', *options.SAMPLING, 'int8', *options.PARTS, *options.DIFFUSION)
# in metrics.json
SETTINGS = ('run', 'split', 'count', 'resize', 'fid_reference', *fid.KINDS, 'lpips', 'n', 'seed', 'int8')


def run() -> None:
  if not FLAGS.run:
    raise ValueError('give --run RUN_DIR, the run directory of a trained model.')
  for name in ('resize', 'fid_reference'):
    if getattr(FLAGS, name) and not any(getattr(FLAGS, kind) for kind in fid.KINDS):
      raise ValueError(f'--{name} is for the FID; give --inception or another network, or leave it out.')
  split.check_out(Path(FLAGS.out))
  with layout.asked(FLAGS, common.MESHES['data'], common.RULES) as where:
    score(where)


def score(where: dict[str, Any]) -> None:
  model, kind = load(where)
  try:
    data = data_of(model)
    source = sources.load(data, FLAGS.split)
  except (ValueError, OSError) as e:
    raise ValueError(in_flags(str(e))) from e
  for line in source.report() if hasattr(source, 'report') else []:
    print(f'{FLAGS.split}: {line}', flush=True)
  distributed.check_same({'data': f'{data.to_json()} {len(source)}', 'checkpoint': str(model.step)})
  evaluation = build(model, kind, source)
  print(f'devices: {jax.device_count()} x {jax.devices()[0].device_kind}', flush=True)
  out = Path(FLAGS.out)
  with split.in_place_of(out) as partial:
    evaluation.run(partial, FLAGS.count)
    given = {k: FLAGS[k].value for k in FLAGS if k in SETTINGS}
    given |= options.sampling_arguments(FLAGS, model) if hasattr(model, 'OBJECTIVE') else {}
    given |= {'source': data.source, 'path': data.path, 'source_args': data.source_args.to_dict()}
    metrics = evaluation.metrics()
    settings = given | {
      'step': model.step,
      'image_size': model.image_size,
      'batch_size': evaluation.settings.batch_size,
    }
    checkpoint.write_json(partial / 'metrics.json', {'settings': settings, **metrics})
  print('\n'.join(f'{k}: {v}' for k, v in metrics.items() if k != 'skipped_records'))
  if not evaluation.seen and not set(metrics) - COUNTS:
    print('nothing here scores these pictures: give --inception or --clip.')
  print(f'wrote {len(evaluation.rows)} pictures, grid.png, predictions.json and metrics.json to {out}')


def in_flags(message: str) -> str:
  """An error about fields of a config, in words of this script's flags."""
  names = {
    'config.data.source_args.': '--source_arg ',
    'source_args.': '--source_arg ',
    'config.data.source': '--source',
    'config.data.path': '--path',
    'config.data has the split': 'there is no split',
    'config.data.val_split="test"': '--split test',
    ', or set config.data.val_split="" to train without it': '',
  }
  for theirs, ours in names.items():
    message = message.replace(theirs, ours)
  return message


def load(where: dict[str, Any]) -> tuple[Any, type[split.Evaluation]]:
  """The pipeline of the run, and what evaluates it. Raises ValueError for flags that it has no use for."""
  step = FLAGS.step or None
  if checkpoint.read_config(FLAGS.run).get('objective') in image_tokenizer.TOKENIZERS:
    if given := [k for k in options.changed(FLAGS, *DRAWING) if k != 'clip']:
      raise ValueError(f'{FLAGS.run} is an image tokenizer, which draws nothing; leave out --{", --".join(given)}.')
    tokenizer = ImageTokenizer.load(FLAGS.run, image_size=FLAGS.image_size, step=step, **where)
    return tokenizer, reconstructions.Reconstructions
  if given := [k for k in ('lpips', 'image_size') if getattr(FLAGS, k)]:
    raise ValueError(f'--{", --".join(given)} is for reconstructions by an image tokenizer; leave it out.')
  if FLAGS.n > 1 and not FLAGS.clip:
    raise ValueError(f'--n {FLAGS.n} needs --clip RUN_DIR, which picks the best of the candidates.')
  model = options.load(FLAGS, where)
  return model, stories.Stories if isinstance(model, StoryGenerator) else captions.Captions


def data_of(model: Any) -> ConfigDict:
  """The source, path and arguments of the data: of --source, or else those of training.

  Stories are for models of stories; others get their frames one by one. Raises ValueError without data.
  """
  trained = model.config['data']
  kind = FLAGS.source or trained.get('source', '')
  if not kind:
    raise ValueError(f'{FLAGS.run} was imported, without data; give them, e.g. --source folder --path DATA.')
  if kind == 'tokens':
    raise ValueError('the data source tokens has no pictures; give them, e.g. --source folder --path DATA.')
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
  """A number, a bool, a tuple as Python writes it, else the text."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, TypeError, ValueError):
    return text


def build(model: Any, kind: type[split.Evaluation], source: Any) -> split.Evaluation:
  """The evaluation, with the networks that the flags name. Raises ValueError for those it has no use for."""
  given = {name: path for name in fid.KINDS if (path := getattr(FLAGS, name))}
  labelled, seen_by = bool(getattr(source, 'label_names', ())), next(iter(given), '')
  networks = {
    k: fid.FeatureExtractor.load(v, model.mesh) for k, v in given.items() if k == seen_by or k == 'classifier'
  }
  if wrong := [k for k, network in networks.items() if network.kind != k]:
    raise ValueError(f'--{wrong[0]} {given[wrong[0]]} is a run of {networks[wrong[0]].kind!r}.')
  if 'clip' in given and seen_by != 'clip' and kind is reconstructions.Reconstructions:
    raise ValueError(f'--clip has nothing to do for an image tokenizer beside --{seen_by}; leave it out.')
  if 'classifier' in networks and seen_by != 'classifier' and not labelled:
    raise ValueError(f'--classifier finds labels, which {FLAGS.source or "the data"} does not have; leave it out.')
  settings = split.Settings(
    n=FLAGS.n,
    seed=FLAGS.seed,
    batch_size=FLAGS.batch_size or getattr(model, 'BATCH', 64),
    sampling={} if kind is reconstructions.Reconstructions else options.sampling(FLAGS, model),
    resize=FLAGS.resize,
    save_true=FLAGS.save_true,
    network=networks.get(seen_by),
    labels=networks.get('classifier'),
    reference=fid.reference(FLAGS.fid_reference, networks[seen_by], FLAGS.resize) if FLAGS.fid_reference else None,
  )
  if kind is not reconstructions.Reconstructions:
    return kind(model, source, settings)
  return reconstructions.Reconstructions(model, source, settings, distance(model))


def distance(model: ImageTokenizer) -> checkpoint.Run | None:
  """LPIPS, of --lpips or of the run."""
  path = FLAGS.lpips or model.frozen.get('lpips')
  if not path:
    return None
  found = checkpoint.load_run(path, mesh=model.mesh)
  if found.config.get('objective') != 'lpips':
    raise ValueError(f'{path} is a run of {found.config.get("objective")!r}; --lpips takes an imported LPIPS.')
  return found


def main(argv: list[str]) -> int:
  return errors.command(argv, FLAGS, run, __doc__, 'flags look like --run RUN --split test.')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
