"""Trains VQGAN, CLIP, DALL-E and StoryDALL-E on the procedural world and reports the results (`make quickstart`).

Everything is written to --run_dir: a run directory for each stage, grid.png, storyboards.png, curves.png, report.md and
metrics.json. After an interruption the same command resumes: each stage continues from its last checkpoint, or is
skipped when done. With --ablations (`make ablations`) it also trains and scores the story model without each of its
parts, with --storyganc (`make storyganc`) StoryGANc.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from dalle_jax.data.sources import shapes, story_shapes
from dalle_jax.evals.oracle import ATTRIBUTES, COLUMNS, Oracle, score_moments
from dalle_jax.functional.decoding import Sampling
from dalle_jax.pipelines import generator
from dalle_jax.pipelines.dalle import DallE
from dalle_jax.pipelines.grids import caption_grid, stacked, storyboard
from dalle_jax.training import errors
from dalle_jax.training.checkpoint import steps, write_json
from dalle_jax.training.metrics import read

ROOT = Path(__file__).resolve().parent
FLAGS = flags.FlagValues()
string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=FLAGS)
integer = lambda name, default, text, high=None: flags.DEFINE_integer(name, default, text, 1, high, flag_values=FLAGS)
boolean = lambda name, text: flags.DEFINE_bool(name, False, text, flag_values=FLAGS)
string('run_dir', 'runs/quickstart', 'output directory')
string('config', str(ROOT / 'configs/quickstart.py'), 'the config with the stages')
integer('prompts', 200, 'held-out captions per split', 2_000)  # as many as there are
integer('candidates', 8, 'samples per caption, of which CLIP picks the best')
flags.DEFINE_float('temperature', 0.8, 'sampling temperature', flag_values=FLAGS)
flags.DEFINE_float('guidance', 1.0, 'classifier-free guidance scale', flag_values=FLAGS)
integer('stories', 100, 'held-out stories per split')
boolean('ablations', 'also train the story model without each of its parts')
boolean('storyganc', 'also train StoryGANc, with and without contextual attention')
text = 'argument for train.py, e.g. --override=--config.train.steps=10'
flags.DEFINE_multi_string('override', [], text, flag_values=FLAGS)
boolean('debug', 'show tracebacks')
STAGES = ('vqgan', 'clip', 'dalle', 'story')
# XLA on the CPU allocates its memory anew for every step; with pages of 2 MB a step of the story model is 19% faster.
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
ABLATIONS = ('no_retro', 'no_story_encoder', 'prompt')  # of configs/story_shapes.py
STORY_RUNS = {  # name in the table -> run directory
  'full': 'story',
  **{variant: f'story_{variant}' for variant in ABLATIONS},
  'storyganc': 'storyganc',
  'storyganc_no_attention': 'storyganc_no_attention',
}


def run() -> None:
  Sampling(temperature=FLAGS.temperature, guidance=FLAGS.guidance)  # refuses bad values before anything is trained
  root = Path(FLAGS.run_dir).expanduser()
  stages = {stage: f'{FLAGS.config}:{stage}' for stage in STAGES}
  if FLAGS.ablations:
    stages |= {f'story_{variant}': f'{ROOT}/configs/story_shapes.py:{variant}' for variant in ABLATIONS}
  if FLAGS.storyganc:
    config = f'{ROOT}/configs/storyganc_shapes.py'
    stages |= {'storyganc': config, 'storyganc_no_attention': f'{config}:no_attention'}
  for stage, config in stages.items():
    print(f'==== {stage}', flush=True)
    command = [sys.executable, str(ROOT / 'train.py'), f'--config={config}', f'--config.root={root}']
    start = time.monotonic()
    child = subprocess.Popen([*command, *FLAGS.override], env={**HUGE_PAGES, **os.environ})
    before = signal.signal(signal.SIGTERM, lambda *_, child=child: child.terminate())  # which then saves
    try:
      code = child.wait()
    except KeyboardInterrupt:
      code = child.wait()  # it has received Ctrl-C, too, and saves
    signal.signal(signal.SIGTERM, before)
    add_seconds(root, stage, time.monotonic() - start)
    if code == errors.STOPPED:
      sys.exit(f'error: stage {stage} was stopped; the same command resumes there.')
    if code:
      sys.exit(f'error: stage {stage} ended with exit code {code}; see its messages above.')
  print('==== evaluation', flush=True)
  start = time.monotonic()
  metrics, rows = evaluate(root)
  variants = {variant: root / run for variant, run in STORY_RUNS.items() if steps(root / run)}
  for variant, run in variants.items():
    scores, boards = evaluate_stories(run)
    metrics |= {f'story/{variant}/{name}': value for name, value in scores.items()}
    stacked(boards).save(root / ('storyboards.png' if variant == 'full' else f'storyboards_{variant}.png'))
  seconds = add_seconds(root, 'evaluation', time.monotonic() - start)
  metrics |= {f'wall_s/{stage}': s for stage, s in seconds.items()}
  caption_grid(rows, ['true', 'best by CLIP']).save(root / 'grid.png')
  draw_curves(root, root / 'curves.png')
  write_json(root / 'metrics.json', metrics)
  (root / 'report.md').write_text(report(metrics))
  print(report(metrics))
  print(f'images: {root}/grid.png  curves: {root}/curves.png  report: {root}/report.md')


def evaluate(root: Path) -> tuple[dict[str, float], list]:
  """Scores reconstructions and samples of held-out scenes with the oracle; also returns rows for the grid."""
  model = DallE.load(root / 'dalle', clip=root / 'clip')
  source_args = model.config['data']['source_args']
  oracle, size = Oracle(source_args['image_size']), source_args['image_size']
  metrics: dict[str, float] = {}
  rows = []

  test = shapes.load('test', image_size=size)
  scenes = [test.scene(k) for k in range(1_000)]
  recon = model.reconstruct(np.stack([shapes.render(s, size) for s in scenes]))
  score = oracle.score(recon, scenes)
  metrics['vqgan/recon_correct'] = float(score['all'].mean())
  metrics |= {f'vqgan/recon_{a}': float(score[a].mean()) for a in ATTRIBUTES}

  n = FLAGS.candidates
  for split, suffix in (('test', ''), ('test_unseen', '_unseen')):
    source = shapes.load(split, image_size=size)
    records = [source[k] for k in range(FLAGS.prompts)]
    scenes = [source.scene(k) for k in range(FLAGS.prompts)]
    sampling = dict(temperature=FLAGS.temperature, guidance=FLAGS.guidance)
    samples = model.sample([r['caption'] for r in records], n=n, seed=0, **sampling)
    images = np.stack([s.images for s in samples])  # (prompts, n, H, W, 3), best first by CLIP
    right = oracle.score(images.reshape(-1, *images.shape[2:]), [s for s in scenes for _ in range(n)])
    right = {a: v.reshape(-1, n) for a, v in right.items()}
    metrics[f'dalle/correct{suffix}'] = float(right['all'].mean())
    metrics[f'dalle/correct{suffix}_best_of_{n}'] = float(right['all'][:, 0].mean())
    metrics[f'dalle/correct{suffix}_any_of_{n}'] = float(right['all'].any(1).mean())
    metrics |= {f'dalle/{a}{suffix}': float(right[a].mean()) for a in ATTRIBUTES}
    for record, sample in list(zip(records, samples, strict=True))[:6]:
      rows.append((record['caption'], [record['image'], *sample.images]))
  return metrics, rows


def evaluate_stories(run: Path) -> tuple[dict[str, float], list]:
  """The shares that the oracle finds right in continued stories, as SPLIT/COLUMN, and three storyboards of each split.

  'setting_silent' is the share of right settings in frames after a change that their captions do not mention;
  'sampling_s' is the time in seconds per story of four frames, with 16 stories at once.
  """
  model = generator.load(run)
  size = model.image_size
  oracle = Oracle(size, accessories=True)
  metrics: dict[str, float] = {}
  boards = []
  for split in ('test_seen', 'test_unseen'):
    source = story_shapes.load(split, image_size=size, count=FLAGS.stories)
    stories = [source.moments(k) for k in range(len(source))]
    moments = [m for story in stories for m in story[1:]]
    sources = np.stack([shapes.render(story[0].scene, size) for story in stories])
    captions = [[m.caption for m in story[1:]] for story in stories]
    samples = model.continue_stories(sources, captions, seed=0, temperature=FLAGS.temperature)
    right = score_moments(oracle, np.concatenate([s.frames[:, 0] for s in samples]), moments)
    metrics |= {f'{split}/{c}': float(right[c].mean()) for c in COLUMNS}
    metrics[f'{split}/setting_silent'] = float(right['setting'][[m.silent for m in moments]].mean())
    boards += [storyboard(s.source, s.frames[:, 0], s.captions) for s in samples[:3]]
  sources, captions = sources[:16], captions[:16]  # one call, which is compiled already
  start = time.monotonic()
  model.continue_stories(sources, captions, seed=1, temperature=FLAGS.temperature)
  metrics['sampling_s'] = (time.monotonic() - start) / len(sources)
  return metrics, boards


def add_seconds(root: Path, stage: str, seconds: float) -> dict[str, float]:
  """Adds to the seconds of a stage, which accumulate over interruptions; returns the seconds of every stage."""
  path = root / 'wall_s.json'
  root.mkdir(parents=True, exist_ok=True)
  known = json.loads(path.read_text()) if path.exists() else {}
  known[stage] = seconds if stage == 'evaluation' else known.get(stage, 0.0) + seconds
  partial = path.with_suffix('.tmp')
  partial.write_text(
    json.dumps(known)
  )  # not by write_json, which initialises JAX: the accelerator belongs to the stages
  partial.replace(path)
  return known


def draw_curves(root: Path, path: Path) -> None:
  """One panel per stage, with the training loss and, where it was measured, the validation loss."""
  figure, axes = plt.subplots(1, len(STAGES), figsize=(4 * len(STAGES), 3.5), layout='constrained')
  for axis, stage in zip(axes, STAGES, strict=True):
    lines = read(root / stage / 'metrics.jsonl')
    for key in ('loss', 'val_loss'):
      points = [(line['step'], line[key]) for line in lines if key in line]
      if points:
        axis.plot(*zip(*points, strict=True), label=key)
    axis.set(title=stage, xlabel='step', yscale='log')
    axis.legend()
  figure.savefig(path, dpi=100)
  plt.close(figure)


def report(metrics: dict[str, float]) -> str:
  """The metrics as a Markdown page."""
  n = FLAGS.candidates
  shown = [
    ('VQGAN: all attributes right in reconstructions of `test`', 'vqgan/recon_correct'),
    ('DALL-E: single samples all right, `test` captions', 'dalle/correct'),
    (f'DALL-E: best of {n} by CLIP, `test`', f'dalle/correct_best_of_{n}'),
    ('DALL-E: single samples all right, `test_unseen`', 'dalle/correct_unseen'),
    (f'DALL-E: best of {n} by CLIP, `test_unseen`', f'dalle/correct_unseen_best_of_{n}'),
  ]
  table = '\n'.join(f'| {name} | {100 * metrics[key]:.1f}% |' for name, key in shown)
  columns = (*COLUMNS, 'setting_silent')
  stories = '\n'.join(
    f'| {variant} | `{split}` | '
    + ' | '.join(f'{100 * metrics[f"story/{variant}/{split}/{c}"]:.1f}%' for c in columns)
    + f' | {1e3 * metrics[f"story/{variant}/sampling_s"]:.0f} ms |'
    for variant in STORY_RUNS
    for split in ('test_seen', 'test_unseen')
    if f'story/{variant}/{split}/caption' in metrics
  )
  times = '\n'.join(f'| {k.removeprefix("wall_s/")} | {v:.0f} |' for k, v in metrics.items() if k.startswith('wall_s/'))
  page = """\
    # Quickstart

    Scenes of `test` are not in the training set; those of `test_unseen` also have pairs of shape and colour that no
    training image has. An image counts only if the background and every attribute of every object are right.

    | measure | share |
    |---|---|
    {table}

    Each row shows the true image, then {n} samples at temperature {temperature}, best first by CLIP. The upper half of
    the captions is from `test`, the lower half from `test_unseen`.

    ![samples](grid.png)
    ![curves](curves.png)

    ## Stories

    Four frames continue a source frame. Captions only name the hero: only the source frame shows what it looks like.
    Heroes of `test_unseen` have a pair of shape and colour that no training image shows. The columns are the shares of
    frames in which these are right: everything that the caption states; the hero's shape, colour and accessory; the
    setting, which is that of the source or of the last change; the hero's size, as the story has left it; and the
    setting in frames after a change that their captions do not mention.

    | model | split | caption | hero | setting | size | setting after a silent change | sampling a story |
    |---|---|---|---|---|---|---|---|
    {stories}

    ![storyboards](storyboards.png)

    | stage | seconds |
    |---|---|
    {times}
    """
  return textwrap.dedent(page).format(table=table, stories=stories, n=n, temperature=FLAGS.temperature, times=times)


def main(argv: list[str]) -> int:
  return errors.command(argv, FLAGS, run, __doc__, 'flags look like --run_dir RUN_DIR.')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
