"""Trains what a config describes, or resumes it if its run directory holds checkpoints.

  python train.py --config configs/quickstart.py:vqgan
  python train.py --config configs/NAME.py:ARGUMENT --config.run_dir=runs/mine --config.optim.lr=3e-4
  python train.py --config configs/NAME.py --distributed     # in every process of a Slurm job or a TPU pod
  python train.py --config configs/NAME.py --coordinator=HOST:PORT --processes=2 --process=0     # and --process=1
`--print_config` prints the resolved config as YAML, one document per stage, and does nothing else (tokenizer.vocab_size
is as given, while a run takes that of its tokenizer). `--debug` shows the traceback of an error that is otherwise
one line.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dalle_jax.data import bpe, pipeline, sources
from dalle_jax.training import checkpoint, distributed, errors, host, loop, sharding
from dalle_jax.training import config as config_lib
from dalle_jax.training.config import inherit

CAPTIONS = 100_000  # captions of the training set from which a tokenizer is trained


def make_tokenizer(config: ConfigDict, before: dict | None, other: dict | None, source) -> bpe.BPE | None:
  """The tokenizer of the checkpoint (its meta is `before`), of the run to start from (`other`), or of a file, or else
  one trained on the captions."""
  c = config.tokenizer
  if not c.vocab_size:
    return None
  if before and before['tokenizer']:
    return bpe.BPE(before['tokenizer'])
  if other and other['tokenizer']:
    known = bpe.BPE(other['tokenizer'])
  elif c.path:
    known = bpe.BPE.load(Path(c.path).expanduser())
  elif other:
    raise ValueError(f'{config.init.path} has no tokenizer; pass --config.tokenizer.path=FILE with that of its model.')
  else:
    known = bpe.train(captions(source, CAPTIONS), c.vocab_size)
  if not c.new_tokens:
    return known
  grown = known.add(c.new_tokens)
  added = grown.vocab_size - known.vocab_size
  print(f'tokenizer: {added} of {len(c.new_tokens)} tokenizer.new_tokens were added', flush=True)
  return grown


def captions(source: pipeline.Source, count: int) -> Iterator[str]:
  """The captions of the first `count` records; skips unreadable ones, which training will report when it gets there."""
  for i in range(min(len(source), count)):
    try:
      texts = source.captions(i) if hasattr(source, 'captions') else [source[i]['caption']]
    except Exception:  # what libraries raise for a broken file has no common class
      continue
    yield from texts


def check_frozen(config: ConfigDict, known: Sequence[str], before: dict | None = None) -> None:
  """Raises ValueError for a name in config.frozen that is not `known`; a run whose meta `before` has it keeps it."""
  kept = before['config'].get('frozen', {}) if before else {}
  if unknown := [name for name in config.frozen if name not in known and name not in kept]:
    expected = f'expected {", ".join(known)}' if known else 'it uses no frozen networks'
    raise ValueError(f'config.frozen has {", ".join(unknown)}; for the objective {config.objective!r} {expected}.')


def frozen_runs(
  config: ConfigDict, run_dir: Path, mesh: jax.sharding.Mesh, started: bool, reads: Sequence[str]
) -> dict[str, checkpoint.Run]:
  """Loads the runs of config.frozen, first copying each to RUN_DIR/frozen, so that a run needs nothing outside itself.

  A run that has `started` (saved once) keeps its copies, whatever becomes of the originals. If training `reads` only
  some of them, the others are copied for sampling: they are not loaded, and their copies follow the originals.
  """
  runs = {}
  for name, path in config.frozen.items():
    copy = run_dir / 'frozen' / name
    copied = checkpoint.origin(copy)
    given = checkpoint.origin(path) if path else ''
    if not copied and not path:
      raise ValueError(f'config.frozen.{name} is empty; pass --config.frozen.{name}=RUN_DIR of a trained {name}.')
    needed = name in reads
    changed = copied and given and given != copied
    if changed and needed and started:
      print(f'config.frozen.{name} is not what this run was trained with; it keeps its copy, {copy}', flush=True)
      changed = False
    renew = bool(changed or not copied)
    if multihost_utils.broadcast_one_to_all(np.int32(renew)):  # process 0 decides: others may see an incomplete copy
      run = checkpoint.load_run(path, mesh=mesh, rules=config.rules)
      if jax.process_index() == 0:
        shutil.rmtree(copy, ignore_errors=True)
      multihost_utils.sync_global_devices(f'frozen {name}')
      checkpoint.export_run(copy, run, mesh=mesh, rules=config.rules)
    if needed:
      try:
        runs[name] = checkpoint.load_run(copy, mesh=mesh, rules=config.rules)
      except FileNotFoundError as e:
        source = path or f'--config.frozen.{name}=RUN_DIR'
        raise OSError(f'{copy} is damaged; delete it and it is copied again from {source}.') from e
  return runs


def check_resumable(run_dir: Path, before: dict, config: ConfigDict) -> None:
  """Raises ValueError if the run in `run_dir`, whose config was `before`, is clearly not the one that `config` trains.

  This comes before anything is written. Differences in the parameters are found later, when the checkpoint is read.
  """
  if before.get('objective') != config.objective:
    raise ValueError(
      f'{run_dir} is a run of {before.get("objective")!r}, but this config trains {config.objective!r}; '
      'pass another --config.run_dir.'
    )
  size = before.get('data', {}).get('image_size', config.data.image_size)
  if config.encode.enabled and size != config.data.image_size:  # would encode the data set again, at another size
    raise ValueError(
      f'{run_dir} was trained with data.image_size={size}, but this config has {config.data.image_size}; '
      'set it back or pass another --config.run_dir.'
    )


def encoded(config: ConfigDict, records: dict, frozen: dict[str, checkpoint.Run], run_dir: Path) -> dict:
  """The splits as codes of the frozen VQGAN, encoded once and stored in RUN_DIR/encoded (or config.encode.path)."""
  if 'vqgan' not in frozen:
    raise ValueError('config.encode.enabled needs a VQGAN to encode images with; pass --config.frozen.vqgan=RUN_DIR.')
  encode = importlib.import_module('dalle_jax.pipelines.encode')
  if config.data.source == 'tokens':
    for source in records.values():
      encode.check(source, frozen['vqgan'])
    return records
  if config.data.augment:
    print(f'data.augment {config.data.augment!r} has no effect: images are encoded once, as central crops')
  folder = Path(config.encode.path or run_dir / 'encoded')
  complete = next(iter(checkpoint.steps(run_dir)), 0) >= config.train.steps
  for split, source in records.items():
    if complete and (folder / split / 'meta.json').is_file():
      continue  # nothing is left to train, so whatever `source` is now, the codes that the run was trained on stay
    sizes = config.data.image_size, config.encode.batch_size, config.data.workers
    encode.encode_dataset(source, frozen['vqgan'], folder / split, *sizes)
  data = config.data.copy_and_resolve_references()
  data.source, data.path, data.source_args = 'tokens', str(folder), ConfigDict()
  return {split: sources.load(data, split) for split in records}


def resolved(config: ConfigDict) -> ConfigDict:
  """A copy without references, and without `~` in the directories that are written to."""
  config = config.copy_and_resolve_references()
  config.run_dir, config.encode.path = map(os.path.expanduser, (config.run_dir, config.encode.path))
  return config


def run(config: ConfigDict) -> bool:
  """Trains one config; returns whether SIGTERM or Ctrl-C asked for a stop.

  Raises ValueError, OSError or loop.Diverged with messages of one line.
  """
  if not config.run_dir:
    raise ValueError('config.run_dir is empty; pass --config.run_dir=runs/NAME.')
  config = resolved(config)
  if config.train.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', str(Path(config.train.compilation_cache).expanduser()))
  if jax.default_backend() == 'cpu':
    host.keep_memory()
  with sharding.use(config.mesh, config.rules) as mesh:
    return train(config, Path(config.run_dir), mesh)


def train(config: ConfigDict, run_dir: Path, mesh: jax.sharding.Mesh) -> bool:
  """The part of `run` within the context of the mesh."""
  module = config_lib.module_named('objectives', config.objective, 'config.objective')
  builders = [
    config_lib.module_named('evals', name, 'config.train.evals', 'build').build for name in config.train.evals
  ]
  run_dir.mkdir(parents=True, exist_ok=True)
  distributed.check_shared(run_dir)
  before = checkpoint.read_meta(run_dir)
  if before:
    check_resumable(run_dir, before['config'], config)
  elif checkpoint.steps(run_dir):
    raise checkpoint.nothing_to_load(run_dir, run_dir)
  check_frozen(config, module.FROZEN, before)

  # Records, tokenizer, frozen networks
  data = config.data
  records = {split: sources.load(data, split) for split in dict.fromkeys([data.split, data.val_split]) if split}
  for split, source in records.items():
    for line in source.report() if hasattr(source, 'report') else []:
      print(f'{split}: {line}', flush=True)
  other = checkpoint.read_about(config.init.path) if config.init.path and not before else None
  if config.model.get('variant') == 'init' and not config.init.path:
    raise ValueError(
      "config.model.variant is 'init', so pass --config.init.path=RUN, a run with the model to start from."
    )
  if config.init.path:
    inherit(config, (other or before)['config'])
  tokenizer = make_tokenizer(config, before, other, records[data.split])
  if tokenizer:
    config.tokenizer.vocab_size = tokenizer.vocab_size
  frozen = frozen_runs(config, run_dir, mesh, before is not None, getattr(module, 'READS', module.FROZEN))
  if config.encode.enabled or data.source == 'tokens':
    records = encoded(config, records, frozen, run_dir)

  # What is stored in the run directory and its checkpoints
  now = config_lib.to_json(config)
  distributed.check_same(
    {
      'config': str(now),
      'tokenizer': tokenizer.to_json() if tokenizer else '',
      'checkpoints': str(checkpoint.steps(run_dir)),
      'records': str({split: len(source) for split, source in records.items()}),
    }
  )
  if before and (changed := config_lib.changes(before['config'], now)):
    print(f'config changed since the last checkpoint: {"; ".join(changed)}', flush=True)
  copies = {name: f'frozen/{name}' for name in config.frozen}
  meta = {'config': now, 'tokenizer': tokenizer.to_json() if tokenizer else None, 'frozen': copies}

  part, parts = sharding.part_to_read(mesh)

  def batches(split: str, training: bool, start: int = 0):
    encoders = {}
    if tokenizer:
      encoders['text'] = bpe.text_encoder(tokenizer, config.tokenizer, config.tokenizer.dropout if training else 0.0)
    for name, other in frozen.items():  # a frozen network that reads text has its own tokenizer
      if other.tokenizer:
        encoders[f'{name}_text'] = bpe.text_encoder(other.tokenizer, other.config['tokenizer'])
    return pipeline.make_loader(
      records[split],
      data,
      encode_text=encoders,
      batch_size=data.batch_size,
      seed=data.seed,
      shuffle=training,
      start_step=start,
      part=part if training else 0,
      parts=parts if training else 1,
    )

  objective = module.from_config(config, {name: r.config for name, r in frozen.items()})

  def initial() -> checkpoint.Params:
    run = checkpoint.load_run(config.init.path, mesh=mesh, rules=config.rules)
    adopt = getattr(objective, 'adopt', lambda params, *_: params)
    return adopt(run.params, run.config, jax.random.key(config.seed))

  held_out = lambda: batches(data.val_split, training=False)
  _, stopped = loop.train(
    config,
    objective,
    lambda start: batches(data.split, True, start),
    mesh=mesh,
    frozen={name: r.network(name) for name, r in frozen.items()},
    evals=[build(objective, config, held_out, mesh) for build in builders] if data.val_split else [],
    meta=meta,
    initial=initial if other else None,
  )
  return stopped


def print_config(config: ConfigDict, stage: str) -> None:
  """Prints as YAML what `run` would train, as far as it is known without reading data; writes no file.

  Raises ValueError for an objective or a frozen network that `run` would refuse.
  """
  config = resolved(config)
  before = checkpoint.read_meta(config.run_dir) if config.run_dir else None
  module = config_lib.module_named('objectives', config.objective, 'config.objective')
  check_frozen(config, module.FROZEN, before)
  if stage:
    print(f'--- # {stage}')
  if config.init.path:
    try:
      inherit(config, before['config'] if before else checkpoint.read_config(config.init.path))
    except OSError as e:  # e.g. an earlier stage that has not been trained
      print(f'# without what it inherits from the run init.path: {" ".join(str(e).split())}')
  print(config_lib.to_yaml(config), end='', flush=True)


def own_flags() -> flags.FlagValues:
  options = flags.FlagValues()
  text = 'print the resolved config as YAML and exit'
  flags.DEFINE_bool('print_config', False, text, flag_values=options)
  flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=options)
  distributed.define_flags(options)
  return options


def main(argv: list[str]) -> int:
  if {'-h', '--help'} & set(argv[1:]):
    print(f'{__doc__}\n{own_flags().get_help()}')
    return 0
  errors.tidy_output()
  options = own_flags()
  try:
    config = config_lib.parse(argv, options)
    if not options.print_config:
      distributed.join(options)
    if config.stages and config.run_dir:
      raise ValueError(
        f'config.run_dir is for a single run, not for {", ".join(config.stages)}; pass --config.root=DIRECTORY.'
      )
    for stage in config.stages or ['']:
      if stage:
        config = config_lib.parse(config_lib.with_stage(argv, stage), own_flags())
      if options.print_config:
        print_config(config, stage)
        continue
      if stage:
        print(f'--- {stage}', flush=True)
      if run(config):
        return errors.STOPPED  # the run is saved, and the same command resumes it
  except errors.EXPECTED as e:
    return errors.report(e, '--debug' in argv)
  except KeyboardInterrupt:  # outside the loop, or for the second time
    return errors.interrupted('stopped; run the same command to resume.')
  return 0


if __name__ == '__main__':
  errors.leave(main(sys.argv))
