"""Continues the stories of a held-out split by a trained StoryDALL-E or StoryGANc and scores every frame.

  python evaluate.py --run runs/quickstart/story --split test_unseen --stories 200
  python evaluate.py --run RUN --path DATA --classifier RUN --resize 64 --out results/pororo
  python evaluate.py --run RUN --clip RUN --n 4          # the best of four by CLIP is scored
  python evaluate.py --run IMPORTED --source pororo --path DATA
Writes OUT/frames/STORY_FRAME.png, OUT/storyboards.png (the first stories), OUT/predictions.json (a row a frame) and
OUT/metrics.json. Frames, scores and the sha256 of the reference are a function of data, runs and flags. Scores: what an
oracle reads, for story_shapes (no network needed); with --classifier or --clip the FID to the true frames at the
model's size, by the features of the former if both are given; with --classifier and labels the characters, for drawn
and for true frames (the ceiling). Published StoryDALL-E figures resize to 64 pixels before FID (--resize 64) and see
through an Inception-v3, so compare FIDs only where metrics.json has the same network, resize and reference beside them.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from dalle_jax.data import pipeline, sources
from dalle_jax.evals import characters, fid
from dalle_jax.evals.oracle import COLUMNS, Oracle, score_moments
from dalle_jax.pipelines import generator
from dalle_jax.pipelines.grids import stacked, storyboard
from dalle_jax.pipelines.stories import StorySample, StoryTeller
from dalle_jax.training import checkpoint, errors

SHOWN = 6  # stories in storyboards.png
Record = tuple[int, dict[str, np.ndarray], list[str]]  # number, arrays of all F frames, F captions
FLAGS = flags.FlagValues()
string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=FLAGS)
integer = lambda name, default, text, low=0: flags.DEFINE_integer(name, default, text, low, flag_values=FLAGS)
string('run', '', 'run directory of a StoryDALL-E or StoryGANc')
string('split', 'test', 'of the data')
string('source', '', 'data other than what the run was trained on, e.g. pororo; with --path')
string('path', '', 'where the data is, if not where it was in training')
string('classifier', '', 'run directory of a classifier: FID by its features, characters')
string('clip', '', 'run directory of a CLIP: ranks candidates, FID by its embeddings')
integer('stories', 0, 'only the first ones; 0: all')
integer('n', 1, 'candidates a frame, of which CLIP picks the best', 1)
integer('seed', 0, 'same seed, same frames')
flags.DEFINE_float('temperature', 1.0, '0: the most probable token, no noise in a GAN', flag_values=FLAGS)
integer('top_k', 0, 'only the k most probable tokens; 0: all')
flags.DEFINE_float('top_p', 1.0, 'only the most probable tokens of this mass', flag_values=FLAGS)
flags.DEFINE_float('guidance', 1.0, 'classifier-free guidance scale; 1: none', flag_values=FLAGS)
integer('resize', 0, "side in pixels that frames are brought to before FID; 0: the network's own")
string('out', 'evaluation', 'directory for what is written')
integer('batch_size', 64, 'pictures at once', 1)
flags.DEFINE_bool('int8', False, 'weights in eight bits', flag_values=FLAGS)
integer('step', 0, 'a checkpoint other than the newest')
flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=FLAGS)


def run() -> None:
  if not FLAGS.run:
    raise ValueError('give --run RUN_DIR, the run directory of a trained StoryDALL-E or StoryGANc.')
  if FLAGS.n > 1 and not FLAGS.clip:
    raise ValueError(f'--n {FLAGS.n} needs --clip RUN_DIR, which picks the best of the candidates.')
  model = generator.load(FLAGS.run, clip=FLAGS.clip, step=FLAGS.step or None, int8=FLAGS.int8)
  if not isinstance(model, StoryTeller):
    raise ValueError(f'{FLAGS.run} is a run of {model.OBJECTIVE!r}, which continues no stories; give one that does.')
  data = data_of(model)
  source = sources.load(data, FLAGS.split)
  for line in source.report() if hasattr(source, 'report') else []:
    print(f'{FLAGS.split}: {line}', flush=True)
  seen_by = FLAGS.classifier or FLAGS.clip
  evaluation = Evaluation(model, source, data.source, fid.Network.load(seen_by) if seen_by else None)
  print(f'devices: {jax.device_count()} x {jax.devices()[0].device_kind}', flush=True)
  out = Path(FLAGS.out)
  evaluation.run(out)
  names = ('run', 'split', 'seed', 'n', 'temperature', 'top_k', 'top_p', 'guidance', 'int8', 'clip', 'classifier')
  settings = {k: getattr(FLAGS, k) for k in names} | {'step': model.step, 'source': data.source, 'path': data.path}
  metrics = evaluation.metrics()
  checkpoint.write_json(out / 'metrics.json', settings | metrics)
  print('\n'.join(f'{k}: {v}' for k, v in metrics.items()))
  print(f'wrote {len(evaluation.rows)} frames, storyboards.png, predictions.json and metrics.json to {out}')


def data_of(model: StoryTeller) -> ConfigDict:
  """The source, path and arguments of the data: of --source, or else those of training. Raises ValueError without."""
  trained = model.config['data']
  kind = FLAGS.source or trained.get('source', '')
  if not kind:
    raise ValueError(f'{FLAGS.run} was imported, without data; give them, e.g. --source pororo --path DATA.')
  own = trained if kind == trained.get('source') else {}
  args = {k: v for k, v in own.get('source_args', {}).items() if k != 'unit'}
  return ConfigDict(dict(source=kind, path=FLAGS.path or own.get('path', ''), source_args=args))


class Evaluation:
  """One pass over a split; `rows` has what predictions.json says of each frame, in order."""

  def __init__(self, model: StoryTeller, source: Any, kind: str, network: fid.Network | None):
    self.model, self.source = model, source
    self.oracle = Oracle(model.image_size, accessories=True) if kind == 'story_shapes' else None
    self.seen = {k: fid.Seen(network, FLAGS.resize) for k in ('drawn', 'true')} if network else {}
    names = getattr(source, 'label_names', ())
    self.tally = characters.Tally(network, names) if names and network and network.kind == 'classifier' else None
    self.rows: list[dict[str, Any]] = []
    self.skipped: list[str] = []  # 'NAME: reason'

  def run(self, out: Path) -> None:
    (out / 'frames').mkdir(parents=True, exist_ok=True)
    count = min(FLAGS.stories or len(self.source), len(self.source))
    size = min(count, max(1, FLAGS.batch_size // (FLAGS.n * self.model.model.frames)))
    stories, boards = self.stories(count), []
    while part := list(itertools.islice(stories, size)):
      samples = self.draw(part, size)
      self.score(part, samples, out)
      boards += [storyboard(s.source, s.frames[:, 0], s.captions) for s in samples[: SHOWN - len(boards)]]
      print(f'{part[-1][0] + 1} of {count} stories', flush=True)
    if not self.rows:
      raise ValueError(f'none of {count} stories is usable; {self.skipped[0]}')
    stacked(boards).save(out / 'storyboards.png')
    checkpoint.write_json(out / 'predictions.json', self.rows)

  def stories(self, count: int) -> Iterator[Record]:
    """Those of the first `count` that are usable; the others are named, counted and left out."""
    examples = pipeline.Examples(self.source, self.model.image_size, '', None)
    for k in range(count):
      try:
        arrays, captions, story = examples.read(k, None)
        if not story or 'image' not in arrays or not all(c.strip() for c in captions[1:]):
          raise ValueError('expected a story of pictures with a caption for every frame after the first')
      except Exception as e:  # what a broken file makes Pillow raise has no common class
        self.skipped.append(' '.join(f'{examples.name(k)}: {type(e).__name__}: {e}'.split()))
        if len(self.skipped) <= pipeline.LOGGED:  # metrics.json has all
          print(f'skipped {self.skipped[-1]}', flush=True)
        continue
      yield k, arrays, captions

  def draw(self, part: Sequence[Record], size: int) -> list[StorySample]:
    """A sample a story; the call is filled up to `size` stories, so that it compiles once."""
    _, arrays, captions = zip(*part, *[part[-1]] * (size - len(part)), strict=True)
    vectors = np.stack([a['vectors'] for a in arrays]) if 'vectors' in arrays[0] else None
    options = {k: getattr(FLAGS, k) for k in ('temperature', 'top_k', 'top_p', 'guidance', 'batch_size')}
    given, told = np.stack([a['image'][0] for a in arrays]), [c[1:] for c in captions]
    return self.model.continue_stories(given, told, FLAGS.n, FLAGS.seed, vectors=vectors, **options)[: len(part)]

  def score(self, part: Sequence[Record], samples: Sequence[StorySample], out: Path) -> None:
    """Writes the frames of these stories and adds their rows, features and labels."""
    rows = []
    for (k, _, _), sample in zip(part, samples, strict=True):
      for t, caption in enumerate(sample.captions):
        row = {'story': self.source.name(k), 'index': k, 'frame': t + 1, 'caption': caption}
        row |= {'file': f'frames/{k:05d}_{t + 1}.png', 'candidate': int(sample.candidates[t, 0])}
        row |= {} if sample.scores is None else {'clip_score': round(float(sample.scores[t, 0]), 4)}
        Image.fromarray(sample.frames[t, 0]).save(out / row['file'])
        rows.append(row)
    images = {'drawn': np.concatenate([s.frames[:, 0] for s in samples])}
    images['true'] = np.concatenate([arrays['image'][1:] for _, arrays, _ in part])
    if self.oracle:
      moments = [m for k, _, _ in part for m in self.source.moments(k)[1:]]
      right = score_moments(self.oracle, images['drawn'], moments)
      for i, (row, moment) in enumerate(zip(rows, moments, strict=True)):
        row |= {'right': {name: bool(values[i]) for name, values in right.items()}, 'silent': moment.silent}
    for name, seen in self.seen.items():
      seen.add(images[name])
    if self.tally:
      who = self.tally.add(np.concatenate([arrays['labels'][1:] for _, arrays, _ in part]), images)
      rows = [row | found for row, found in zip(rows, who, strict=True)]
    self.rows += rows

  def metrics(self) -> dict[str, Any]:
    """The scores of all frames."""
    result: dict[str, Any] = {'stories': len({row['index'] for row in self.rows}), 'frames': len(self.rows)}
    result |= {'skipped': len(self.skipped), 'skipped_stories': self.skipped}
    if self.oracle:
      share = lambda name, rows: float(np.mean([r['right'][name] for r in rows])) if rows else None
      silent = [r for r in self.rows if r['silent']]
      result |= {name: share(name, self.rows) for name in COLUMNS}
      result |= {'setting_silent': share('setting', silent), 'silent_frames': len(silent)}
    if 'clip_score' in self.rows[0]:
      result['clip_score'] = float(np.mean([r['clip_score'] for r in self.rows]))
    result |= self.tally.report() if self.tally else {}
    return result | (fid.report(**self.seen) if self.seen else {})


def main(argv: list[str]) -> int:
  return errors.command(argv, FLAGS, run, __doc__, 'flags look like --run RUN --split test.')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
