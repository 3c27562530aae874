"""Generates images from captions (DALL-E, DALL-E mini, unCLIP), or continues a story (StoryDALL-E, StoryGANc).

  python sample.py --run runs/quickstart/dalle --clip runs/quickstart/clip --prompt "a large red circle at the top"
  python sample.py --run RUN --prompts captions.txt --n 8 --guidance 2       # one caption per line
  python sample.py --run RUN --prompt "..." --init_image photo.png --keep_rows 3     # completes the lower part
  python sample.py --run RUN --prompt "a red" --complete                    # first completes the caption by the DALL-E
  python sample.py --run RUN --prompts captions.txt --mesh data=-1,fsdp=1 --distributed   # in every process of a job
  python sample.py --run runs/dalle_mini --prompt "..." --guidance 10 --top_k 256   # an imported DALL-E mini
  python sample.py --run UNCLIP --prompt "..." --guidance 4 --steps 50
  python sample.py --run UNCLIP --vary photo.png --n 8                       # images with the same CLIP embedding
  python sample.py --run runs/quickstart/story --story story.json --source frame.png  # {"captions": ["...", "..."]}
Writes OUT/NUMBER_RANK.png, best first with --clip, OUT/samples.json, OUT/grid.png (the first 100 captions) and, for a
story, OUT/storyboard.png; images that an earlier samples.json lists are removed, but a file that was given is never
replaced. `--debug` shows tracebacks.
"""

import itertools
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from configs import common
from dalle_jax.data.restricted import open_array
from dalle_jax.data.sources import caption_lines
from dalle_jax.pipelines import options
from dalle_jax.pipelines.grids import caption_grid, storyboard
from dalle_jax.pipelines.stories import StoryGenerator
from dalle_jax.training import distributed, errors, layout

FLAGS = flags.FlagValues()
string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=FLAGS)
string('run', '', 'run directory of a DALL-E, DALL-E mini, unCLIP, StoryDALL-E or StoryGANc')
string('clip', '', 'run directory of a CLIP that ranks the images')
flags.DEFINE_multi_string('prompt', [], 'a caption; may be repeated', flag_values=FLAGS)
string('prompts', '', 'a text file with one caption per line')
string('out', 'samples', 'output directory')
flags.DEFINE_integer('n', 4, 'images per caption', 1, flag_values=FLAGS)
flags.DEFINE_integer('best', 0, 'how many of them are written, best first; 0: all', 0, flag_values=FLAGS)
options.define_flags(FLAGS)
string('story', '', 'a JSON file with the captions of a story: a list, or {"captions": [...], "source": "frame.png"}')
string('source', '', 'the frame that the story continues from')
string('vectors', '', 'a .npy file float32[captions, dim], for a model that reads sentence vectors')
string('init_image', '', 'an image to complete')
flags.DEFINE_integer('keep_rows', 0, 'rows of its image tokens to keep', 0, flag_values=FLAGS)
string('vary', '', 'an image to vary, with an unCLIP')
flags.DEFINE_bool('complete', False, 'first complete the captions, by the same DALL-E', flag_values=FLAGS)
layout.define_flags(FLAGS)
flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=FLAGS)
SHOWN = 100  # captions in OUT/grid.png


def prompts() -> list[str]:
  """The captions of --prompt and --prompts."""
  found = list(FLAGS.prompt)
  if FLAGS.prompts:
    path = Path(FLAGS.prompts).expanduser()
    if not path.exists() or path.is_dir():  # a pipe will do
      raise FileNotFoundError(f'there is no file {path}; expected a text file in UTF-8 with one caption per line.')
    found += caption_lines(path.read_bytes(), str(path))
  if not found:
    raise ValueError('there is no caption; give --prompt "..." or --prompts FILE with one per line.')
  return found


def story() -> list[str]:
  """The captions of --story; its source becomes --source where that is empty."""
  if FLAGS.prompt or FLAGS.prompts or FLAGS.init_image or FLAGS.keep_rows:
    raise ValueError(
      '--story gives the captions and --source the image; leave out --prompt, --prompts, --init_image and --keep_rows.'
    )
  path = Path(FLAGS.story).expanduser()
  if not path.exists() or path.is_dir():
    raise FileNotFoundError(f'there is no file {path}; expected a JSON file with the captions of a story.')
  try:
    found = json.loads(path.read_text(encoding='utf-8-sig'))
  except ValueError as e:
    raise ValueError(f'{path} is not a JSON file ({e}); expected {{"captions": ["...", "..."]}}.') from e
  found = {'captions': found} if isinstance(found, list) else found
  captions = found.get('captions') if isinstance(found, dict) else None
  if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
    raise ValueError(f'{path} has no list of captions; expected {{"captions": ["...", "..."]}}.')
  if not isinstance(found.get('source', ''), str):
    raise ValueError(f'{path} has the source {found["source"]!r}; expected the name of an image.')
  if not FLAGS.source and found.get('source'):
    FLAGS.source = str(path.parent / found['source'])
  if not FLAGS.source:
    raise ValueError('a story continues from an image; give it with --source FRAME.png.')
  return captions


def inputs() -> dict[str, Path]:
  """The files that this command was given, by flag."""
  names = ('prompts', 'story', 'source', 'vectors', 'init_image', 'vary')
  return {name: Path(FLAGS[name].value) for name in names if FLAGS[name].value}


def run() -> None:
  if not FLAGS.run:
    kinds = 'DALL-E, DALL-E mini, unCLIP, StoryDALL-E or StoryGANc'
    raise ValueError(f'give --run RUN_DIR, the run directory of a trained {kinds}.')
  if FLAGS.source and not FLAGS.story:
    raise ValueError('--source is the first frame of a story; give its captions with --story FILE.')
  if FLAGS.vary:
    others = ('story', 'prompt', 'prompts', 'init_image', 'keep_rows', 'clip', 'prior')
    if given := options.changed(FLAGS, *others):
      raise ValueError(f'--vary needs an image only; leave out --{", --".join(given)}.')
    requests = [FLAGS.vary]
  else:
    requests = story() if FLAGS.story else prompts()
  with layout.asked(FLAGS, common.MESHES['data'], common.RULES) as where:
    generate(requests, where)


def generate(requests: list[str], where: dict[str, Any]) -> None:
  """Generates and writes images for captions, for those of a story, or for the image to vary."""
  files = [f.read_bytes() for f in inputs().values() if f.is_file()]
  distributed.check_same({'captions': str(requests), 'files': str(files)})
  out = Path(FLAGS.out).expanduser()
  if jax.process_index() == 0:
    make_writable(out)
    check_kept(out, len(requests))
  model = options.load(FLAGS, where)
  if isinstance(model, StoryGenerator) != bool(FLAGS.story):
    wanted = 'a caption; give --prompt "..."' if FLAGS.story else 'a story; give --story FILE and --source FRAME.png'
    raise ValueError(f'{FLAGS.run} is a run of {model.OBJECTIVE!r}, which needs {wanted}.')
  if FLAGS.vectors and model.config['model'].get('sentences') != 'data':
    raise ValueError(f'{FLAGS.run} reads no sentence vectors; leave out --vectors.')
  if FLAGS.complete:
    requests = complete(model, requests)
  print(f'devices: {jax.device_count()} x {jax.devices()[0].device_kind}', flush=True)
  sampling = dict(n=FLAGS.n, seed=FLAGS.seed, batch_size=FLAGS.batch_size or model.BATCH)
  sampling |= options.sampling(FLAGS, model)
  board = None
  if FLAGS.story:
    vectors = np.array(open_array(FLAGS.vectors, 'sentence vectors, one a caption')) if FLAGS.vectors else None
    sample = model.continue_story(FLAGS.source, requests, vectors=vectors, **sampling)
    scores = [None] * len(requests) if sample.scores is None else sample.scores
    results = list(zip(requests, sample.frames, sample.candidates, scores, strict=True))
    board = storyboard(sample.source, sample.frames[:, 0], requests)
  else:
    samples = independent_samples(model, requests, sampling)
    results = [(r, s.images, s.candidates, s.scores) for r, s in zip(requests, samples, strict=True)]
  if jax.process_index() == 0:
    write(out, results, board, options.sampling_arguments(FLAGS, model))


def complete(model: Any, requests: list[str]) -> list[str]:
  """The captions, completed by the model."""
  if not hasattr(model, 'complete_captions'):
    raise ValueError(f'{FLAGS.run} is a run of {model.OBJECTIVE!r}; --complete needs one of a DALL-E.')
  how = {name: getattr(FLAGS, name) for name in ('seed', 'temperature', 'top_k', 'top_p')}
  completed = [captions[0] for captions in model.complete_captions(requests, **how)]
  if jax.process_index() == 0:
    for before, after in zip(requests, completed, strict=True):
      print(f'{before!r} is completed to {after!r}', flush=True)
  return completed


def independent_samples(model: Any, requests: list[str], sampling: dict[str, Any]) -> list[Any]:
  """Samples for captions, or for the image of --vary. Raises ValueError for flags that the model has no use for."""
  if FLAGS.vary:
    if not hasattr(model, 'variations'):
      raise ValueError(f'{FLAGS.run} is a run of {model.OBJECTIVE!r}; --vary needs one of an unCLIP.')
    if given := options.changed(FLAGS, 'temperature', 'top_k', 'top_p', 'prior_guidance', 'prior_steps', 'priors'):
      raise ValueError(f'--{", --".join(given)} is not for --vary, which uses no tokens and no prior; leave it out.')
    names = ('n', 'seed', 'batch_size', 'guidance', 'steps', 'upsampler_steps', 'eta')
    return model.variations(requests, **{name: sampling[name] for name in names})
  if hasattr(model, 'encode'):
    return model.sample(requests, init_image=FLAGS.init_image or None, keep_rows=FLAGS.keep_rows, **sampling)
  if FLAGS.init_image or FLAGS.keep_rows:
    raise ValueError(f'{FLAGS.run} has no image tokens to keep; leave out --init_image and --keep_rows.')
  return model.sample(requests, **sampling)


def make_writable(out: Path) -> None:
  """Creates the output directory. Raises ValueError when files cannot be written to it."""
  try:
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
  except OSError as e:
    raise ValueError(f'--out {out} cannot be written to ({e.strerror}); give another directory.') from e


def image_files(count: int) -> list[list[str]]:
  """The names of the images of `count` requests, best first."""
  first = 1 if FLAGS.story else 0  # frame 0 of a story is the source
  ranks = range(min(FLAGS.best or FLAGS.n, FLAGS.n))
  return [[f'{number:03d}_{rank}.png' for rank in ranks] for number in range(first, first + count)]


def check_kept(out: Path, count: int) -> None:
  """Raises ValueError when `write` would replace a file that this command was given, by whatever name."""
  names = [*itertools.chain(*image_files(count)), 'grid.png', 'samples.json', *['storyboard.png'] * bool(FLAGS.story)]
  written = [path for name in names if (path := out / name).is_file()]
  for flag, path in inputs().items():
    if path.is_file() and any(path.samefile(other) for other in written):
      raise ValueError(f'--out {out} would overwrite --{flag} {path}; give another directory with --out.')


def write(out: Path, results: Sequence[tuple[Any, ...]], board: Image.Image | None, sampling: dict[str, Any]) -> None:
  """Writes images, grid and table of (caption, images, numbers, scores) each, and the storyboard of a story."""
  make_writable(out)
  remove_earlier(out)
  table, rows = [], []
  for files, (caption, images, candidates, scores) in zip(image_files(len(results)), results, strict=True):
    images, candidates = images[: len(files)], candidates[: len(files)]
    for file, image in zip(files, images, strict=True):
      Image.fromarray(image).save(out / file)
    rounded = None if scores is None else [round(float(s), 4) for s in scores[: len(files)]]
    table.append({'prompt': caption, 'files': files, 'candidates': candidates.tolist(), 'scores': rounded})
    rows.append((caption, images))
  given = options.changed(FLAGS, 'source', 'vectors', 'init_image', 'keep_rows', 'vary')
  settings = {k: FLAGS[k].value for k in ('run', 'clip', 'seed', 'n', *given)} | sampling
  (out / 'samples.json').write_text(json.dumps({**settings, 'samples': table}, indent=2) + '\n')
  caption_grid(rows[:SHOWN]).save(out / 'grid.png')
  if board:
    board.save(out / 'storyboard.png')
  more = 'storyboard.png, ' if FLAGS.story else ''
  print(f'wrote {sum(len(t["files"]) for t in table)} images, {more}grid.png and samples.json to {out}')


def remove_earlier(out: Path) -> None:
  """Removes the images that an earlier samples.json in `out` lists, except those that this command was given."""
  try:
    files = [name for row in json.loads((out / 'samples.json').read_text())['samples'] for name in row['files']]
  except (OSError, ValueError, KeyError, TypeError):
    return  # there is no such file, or it is something else
  kept = {path.resolve() for path in inputs().values()}
  for path in (out / name for name in files if re.fullmatch(r'\d+_\d+\.png', str(name))):
    if path.resolve() not in kept:
      path.unlink(missing_ok=True)


def main(argv: list[str]) -> int:
  return errors.command(argv, FLAGS, run, __doc__, 'a caption needs --prompt "...".')


if __name__ == '__main__':
  errors.leave(main(sys.argv))
