import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dalle_jax.training import checkpoint, hub, metrics, sharding
from tests.training import toy
from tests.training.test_loop import same


@pytest.fixture
def run_dir(tmp_path):
  """A run with checkpoints of the steps 4 and 8."""
  toy.run(toy.config(tmp_path))
  assert checkpoint.steps(tmp_path) == [8, 4]
  return tmp_path


def truncate(path):
  """Cuts every file of array data in half."""
  for file in (p for p in path.glob('state/**/d/*') if p.is_file()):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_truncated_newest_checkpoint_falls_back_with_a_warning(run_dir, capsys):
  whole = checkpoint.load_run(run_dir)
  (run_dir / 'checkpoints' / '8.damaged' / 'state').mkdir(parents=True)  # from an earlier time
  truncate(run_dir / 'checkpoints' / '8')
  run = checkpoint.load_run(run_dir)
  assert run.step == 4
  assert 'warning: checkpoint 8' in capsys.readouterr().out
  toy.run(toy.config(run_dir))  # goes on from 4 and saves 8 again
  assert checkpoint.steps(run_dir) == [8, 4] and (run_dir / 'checkpoints' / '8.damaged_2').exists()
  same(checkpoint.load_run(run_dir).params, whole.params)


def test_a_run_needs_a_path():
  for nothing in ('', None, 3):
    with pytest.raises(ValueError, match='a run is given by its directory'):
      checkpoint.load_run(nothing)


def test_a_directory_in_which_nothing_could_be_saved_is_refused_before_training(tmp_path):
  with pytest.raises(ValueError, match='has square brackets; choose another'):
    toy.run(toy.config(tmp_path / 'seeds=[1]', steps=1))
  assert checkpoint.steps(tmp_path / 'seeds=[1]') == []


def test_nothing_usable_is_one_line(run_dir, tmp_path):
  for step in (4, 8):
    truncate(run_dir / 'checkpoints' / str(step))
  for load in (checkpoint.load_run, lambda path: toy.run(toy.config(path))):
    with pytest.raises(FileNotFoundError, match='no checkpoint that can be read') as e:
      load(run_dir)
    assert '\n' not in str(e.value)
  with pytest.raises(
    OSError, match=r'checkpoint 8 of .* is damaged; pass another step \(OSError: its state is not whole'
  ):
    checkpoint.load_run(run_dir, step=8)
  for step in (4, 8):
    (run_dir / 'checkpoints' / str(step) / 'meta' / 'metadata').write_text('{"conf')
  with pytest.raises(FileNotFoundError, match='no checkpoint that can be read: all of them are damaged'):
    checkpoint.read_config(run_dir)
  with pytest.raises(FileNotFoundError, match='has no checkpoints'):
    checkpoint.load_run(tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match=r'no checkpoint of step 5; there are \[8, 4\]'):
    checkpoint.load_run(run_dir, step=5)


def test_load_run_on_another_mesh(run_dir):
  c = toy.config(run_dir)
  alone = checkpoint.load_run(run_dir)
  with sharding.use(dict(data=2, fsdp=2, tensor=2), c.rules) as mesh:
    split = checkpoint.load_run(run_dir, mesh=mesh, rules=c.rules)
  same(alone.params, split.params)
  kernel = split.params['net']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (4, 8)
  assert (alone.tokenizer, alone.step, alone.config) == ('words', 8, {'objective': 'toy'})


def test_export_is_a_run_with_its_frozen_networks(run_dir, tmp_path):
  run = checkpoint.load_run(run_dir)
  checkpoint.export_run(tmp_path / 'a', run)
  checkpoint.export_run(tmp_path / 'b', checkpoint.load_run(tmp_path / 'a'))
  exported = checkpoint.load_run(tmp_path / 'b')
  same(exported.params, run.params)
  assert (exported.tokenizer, exported.step, exported.axes) == (run.tokenizer, 8, run.axes)
  assert exported.network('vqgan') is exported.params['net']  # the only player


def test_copies_of_a_run_know_where_it_comes_from_however_it_is_named(run_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(run_dir.parent))
  monkeypatch.setattr(hub, 'local', lambda path, local=hub.local: run_dir if path == 'owner/run' else local(path))
  for i, name in enumerate([run_dir, f'~/{run_dir.name}', 'owner/run']):
    checkpoint.export_run(tmp_path / str(i), checkpoint.load_run(name))
  origins = {checkpoint.origin(path) for path in (run_dir, f'~/{run_dir.name}', *map(tmp_path.joinpath, '012'))}
  assert origins == {checkpoint.origin(run_dir)}


def test_resume_refuses_another_model_and_names_the_tensors(run_dir):
  assert json.loads((run_dir / 'config.json').read_text()) == {'objective': 'toy'}
  (run_dir / 'config.json').write_text('kept')
  with pytest.raises(ValueError, match=r'does not fit this config: missing .*params/critic/up/kernel float32\[8, 16\]'):
    toy.run(toy.config(run_dir), toy.Toy(critic=True))
  with pytest.raises(ValueError, match=r'unexpected ema/net/down/bias'):
    toy.run(toy.config(run_dir, ema=0.0))
  assert (run_dir / 'config.json').read_text() == 'kept'  # not replaced by a config that does not fit


def test_dtype_mismatch_is_an_error(tmp_path):
  with ocp.CheckpointManager(tmp_path / 'checkpoints') as m:
    checkpoint.save(m, 1, {'params': {'a': jnp.ones(3)}}, {'config': {}})
    checkpoint.finish(m)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {'params': {'a': jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=here)}}
  with pytest.raises(ValueError, match=r'params/a is float32\[3\], expected bfloat16\[3\]'):
    checkpoint.resume(tmp_path, target)


def test_strict_merge():
  ours = {'a': {'k': jnp.zeros(2), 'cross': jnp.zeros(1)}, 'b': jnp.zeros((2, 2))}
  theirs = {'a': {'k': jnp.ones(2)}, 'b': jnp.ones((2, 2))}
  merged = checkpoint.strict_merge(ours, theirs, new='.*/cross')
  np.testing.assert_array_equal(merged['a']['k'], np.ones(2))
  np.testing.assert_array_equal(merged['a']['cross'], np.zeros(1))
  wrong = {'a': {'k': jnp.ones(3)}, 'c': jnp.ones(1)}
  with pytest.raises(ValueError) as e:
    checkpoint.strict_merge(ours, wrong)
  for part in ('missing a/cross', 'missing b float32[2, 2]', 'unexpected c', 'a/k is float32[3], expected float32[2]'):
    assert part in str(e.value)


def test_start_from_another_run_which_is_not_kept_in_memory(run_dir, tmp_path):
  def run(name, **start):
    """The parameters after a step, and the bytes of all arrays after it."""
    c = toy.config(tmp_path / name, steps=1, eval_every=1, log_every=1)
    c.optim.lr, c.data.val_split = 0.0, 'val'
    held = lambda params, ctx: {'bytes': gc.collect() * 0 + sum(x.nbytes for x in jax.live_arrays())}
    params = jax.device_get(toy.run(c, evals=[held], **start).params)
    return params, metrics.read(tmp_path / name / 'metrics.jsonl')[-1]['bytes']

  loaded = checkpoint.load_run(run_dir)
  _, alone = run('alone')
  params, together = run('fine', initial=lambda: checkpoint.load_run(run_dir).params)
  same(params, loaded.params)
  assert together == alone
