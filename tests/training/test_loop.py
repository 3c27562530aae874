import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from dalle_jax.aot import costs
from dalle_jax.evals import loss as eval_loss
from dalle_jax.evals import pictures
from dalle_jax.training import checkpoint, host, loop, metrics, sharding
from dalle_jax.training.plan import Plan
from dalle_jax.training.step import make_step
from tests.training import toy

ROOT = Path(__file__).parents[2]


def same(a, b):
  a, b = sharding.flatten(a), sharding.flatten(b)
  assert a.keys() == b.keys()
  for k in a:
    np.testing.assert_array_equal(np.asarray(a[k]), np.asarray(b[k]), err_msg=k)


def close(a, b):
  a, b = sharding.flatten(a), sharding.flatten(b)
  assert a.keys() == b.keys()
  for k in a:
    np.testing.assert_allclose(np.asarray(a[k]), np.asarray(b[k]), atol=2e-5, err_msg=k)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """An uninterrupted run of eight steps, and its directory."""
  path = tmp_path_factory.mktemp('straight')
  return toy.run(toy.config(path)), path


@pytest.mark.parametrize('mesh, part', [((1, -1, 1), (1, 16)), ((2, 2, 2), (4, 8))])
def test_sharded_equals_unsharded(tmp_path, straight, mesh, part):
  c = toy.config(tmp_path)
  c.mesh.update(dict(zip(('data', 'fsdp', 'tensor'), mesh, strict=True)))
  state = toy.run(c)
  close(straight[0].params, state.params)
  kernel = state.params['net']['up']['kernel']  # (embed, mlp): split over fsdp and tensor
  assert kernel.sharding.shard_shape(kernel.shape) == part


@pytest.mark.parametrize('offload', [False, True])
def test_resumed_equals_uninterrupted(tmp_path, straight, offload):
  """Also when the moments are in host memory."""
  c = toy.config(tmp_path, offload_optimizer=offload)

  def interrupted(start):
    for step, batch in zip(range(start, 99), toy.batches(start), strict=False):
      if start == 0 and step == 6:
        raise KeyboardInterrupt
      yield batch

  with pytest.raises(KeyboardInterrupt):
    toy.run(c, batches=interrupted)
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 6, "loss": 1.0}\n{}\n5\n{"step": 8, "lo')  # what a crash leaves behind
  resumed = toy.run(c, batches=interrupted)
  same(straight[0], resumed)
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(resumed.opt_state) if x.ndim}
  assert kinds == {'pinned_host' if offload else 'device'}
  ours, theirs = (metrics.read(p / 'metrics.jsonl') for p in (tmp_path, straight[1]))
  assert [m['step'] for m in ours] == [2, 4, 6, 8]
  assert [m['loss'] for m in ours] == [m['loss'] for m in theirs]
  assert all(a['seconds'] < b['seconds'] for a, b in itertools.pairwise(ours))


@pytest.mark.parametrize('before,after', [(0.1, 0.0), (0.0, 0.1)])
def test_a_run_resumes_without_the_decay_that_it_began_with_and_the_other_way_round(tmp_path, before, after):
  for steps, decay in ((2, before), (4, after)):
    c = toy.config(tmp_path, steps=steps)
    c.optim.weight_decay = decay
    state = toy.run(c)
  assert int(state.step) == 4 and not list(tmp_path.glob('checkpoints/*.damaged'))


def test_killed_equals_uninterrupted(tmp_path):
  """A run that saves often is killed by kill -9 at random moments, started again, and completed by this process."""
  command = [sys.executable, '-m', 'tests.training.toy', tmp_path / 'killed', '60', '3']
  lines = lambda: len(metrics.read(tmp_path / 'killed' / 'metrics.jsonl'))
  rng = random.Random(0)
  for _ in range(2):
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    goal = lines() + rng.randint(4, 20)
    while child.poll() is None and lines() < goal:
      time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
  toy.run(toy.config(tmp_path / 'killed', steps=60, checkpoint_every=3, log_every=1))
  assert [m['step'] for m in metrics.read(tmp_path / 'killed' / 'metrics.jsonl')] == list(range(1, 61))
  straight = toy.run(toy.config(tmp_path / 'straight', steps=60, checkpoint_every=0, log_every=20))
  same(checkpoint.load_run(tmp_path / 'killed', ema=False).params, straight.params)


def stop_at(at):
  """Batches of which the one for step `at` comes with a SIGTERM, unless training resumes."""

  def batches(start):
    for step, batch in enumerate(toy.batches(start), start + 1):
      if start == 0 and step == at:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  return batches


def test_sigterm_saves_and_stops(tmp_path, straight, capsys):
  c = toy.config(tmp_path)
  assert toy.train(c, batches=stop_at(3))[1]
  assert 'stopped at step 3 and saved' in capsys.readouterr().out
  assert checkpoint.steps(tmp_path) == [3]
  state, stopped = toy.train(c, batches=stop_at(3))
  same(straight[0], state)
  assert not stopped


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('steps, said', [(0, '0 without saving; there is no checkpoint yet'), (4, '4 and saved')])
def test_a_signal_whose_interrupt_gets_lost_while_tracing_stops_before_the_first_step(
  tmp_path, capsys, number, steps, said
):
  class Loses(toy.Toy):
    def init(self, rng, batch):
      with contextlib.suppress(KeyboardInterrupt):  # as Python does in a callback of the garbage collector
        signal.raise_signal(number)
      return super().init(rng, batch)

  if steps:
    toy.run(toy.config(tmp_path, steps=steps))
  handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  signal.signal(number, lambda *_: None)  # for the second time, which acts as usual
  try:
    state, stopped = toy.train(toy.config(tmp_path), Loses())
  finally:
    list(map(signal.signal, (signal.SIGINT, signal.SIGTERM), handlers))
  assert stopped and state.step == steps and checkpoint.steps(tmp_path) == [steps] * (steps > 0)
  assert f'stopped at step {said}' in capsys.readouterr().out


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_setup_ends_at_once(tmp_path, number):
  def batches(start):
    signal.raise_signal(number)
    raise AssertionError('setup goes on')

  handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  with pytest.raises(KeyboardInterrupt):
    toy.run(toy.config(tmp_path), batches=batches)
  assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
  assert not list(tmp_path.iterdir())


@pytest.fixture
def interruptible():
  """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background, which may ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_the_second_signal_ends_at_once_and_what_is_saved_stays(tmp_path, interruptible):
  def batches(start):
    for step, batch in enumerate(toy.batches(start), start + 1):
      for _ in range(2 if step == 6 else 0):
        signal.raise_signal(signal.SIGINT)
      yield batch

  with pytest.raises(KeyboardInterrupt):
    toy.run(toy.config(tmp_path), batches=batches)
  assert checkpoint.steps(tmp_path) == [4] and len(metrics.read(tmp_path / 'metrics.jsonl')) == 2


@pytest.mark.parametrize('at', [4, 8])
def test_an_evaluation_that_a_stop_skips_is_made_up_for(tmp_path, at):
  c, steps = toy.config(tmp_path, eval_every=4), []

  def evaluate(params, ctx):
    steps.append(int(ctx.step))
    return {'val': float(ctx.step)}

  state, stopped = toy.train(c, evals=[evaluate], batches=stop_at(at))
  assert stopped and state.step == at and at not in steps
  assert not toy.train(c, evals=[evaluate])[1]
  assert {m['step']: m.get('val') for m in metrics.read(tmp_path / 'metrics.jsonl')} == {2: None, 4: 4, 6: None, 8: 8}
  assert steps == [4, 8]


def test_a_stop_during_the_last_evaluation_is_reported(tmp_path):
  def evaluate(params, ctx):
    if ctx.step == 8:
      os.kill(os.getpid(), signal.SIGTERM)
    return {'val': 1.0}

  assert toy.train(toy.config(tmp_path, eval_every=4), evals=[evaluate])[1]
  assert metrics.read(tmp_path / 'metrics.jsonl')[-1]['val'] == 1.0


def test_nan_stops_with_step_and_metric_and_keeps_the_last_good_checkpoint(tmp_path):
  with pytest.raises(loop.Diverged, match=r'grad_norm, loss is not finite at step 6.*step 4 is kept'):
    toy.run(toy.config(tmp_path, log_every=8), toy.Toy(nan_at=5))
  assert checkpoint.steps(tmp_path) == [4]
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(checkpoint.load_run(tmp_path).params))


def test_state_that_is_not_finite_is_never_saved(tmp_path, capsys):
  toy.run(toy.config(tmp_path, nan_guard=False), toy.Toy(nan_at=5), batches=stop_at(7))
  out = capsys.readouterr().out
  assert checkpoint.steps(tmp_path) == [4] and 'not saved' in out
  assert 'stopped at step 7 without saving; the checkpoint of step 4 is kept' in out


def test_an_array_that_is_not_finite_is_named_although_the_metrics_are(tmp_path):
  objective = toy.Toy()
  objective.after_update = lambda params, _: jax.tree.map(lambda x: x / 0.0 if x.shape == (16, 8) else x, params)
  with pytest.raises(loop.Diverged, match=r'params/net/down/kernel is not finite after step 1'):
    toy.run(toy.config(tmp_path, checkpoint_every=1, ema=0.0), objective)
  assert checkpoint.steps(tmp_path) == []


def test_accumulation_equals_full_batch(tmp_path):
  states = [toy.run(toy.config(tmp_path / str(n), accum=n), toy.Toy()) for n in (1, 2)]
  close(*(s.params for s in states))
  a, b = (metrics.read(tmp_path / str(n) / 'metrics.jsonl') for n in (1, 2))
  assert [m['accuracy'] for m in a] == pytest.approx([m['accuracy'] for m in b])
  assert [int(s.mutable['seen']) for s in states] == [8, 16]


def test_replicas_reduce_their_gradients_once_an_update(tmp_path):
  def reduced(accum, apart):
    """Bytes of all all-reduces in an update."""
    objective, c = toy.Toy(counts=False), toy.config(tmp_path)
    objective.rows_apart = apart
    with sharding.use(dict(data=4), c.rules, jax.devices()[:4]) as mesh:
      c.train.update(accum=accum, ema=0.0)
      plan = Plan(c, objective, next(toy.batches()), mesh)
      text = make_step(plan).lower(plan.state, {}, plan.batch).compile().as_text()
    return sum(r.times * c.bytes for r in costs.regions(text, 4) for c in r.collectives if c.kind == 'all-reduce')

  assert reduced(4, True) == pytest.approx(reduced(1, False), rel=0.05)  # the metrics are reduced, too
  assert reduced(4, False) > 3 * reduced(1, False)


def test_options_of_the_compiler(tmp_path, monkeypatch, capsys):
  """Those for convolutions are for convolutional objectives alone; of a config, unknown ones are left out."""
  c, used = toy.config(tmp_path), []
  monkeypatch.setattr(jax, 'jit', lambda f, jit=jax.jit, **kw: used.append(kw.get('compiler_options')) or jit(f, **kw))
  with sharding.use(c.mesh, c.rules) as mesh:
    known = host.convolution_options(sharding.whole(mesh))
    for convolutional, options in (
      (False, {'xla_cpu_enable_fast_math': True}),
      (True, {'xla_cpu_enable_fast_math': True, 'xla_no_such_option': 1}),
      (True, dict.fromkeys(known, 'LIBRARY_FUSION_TYPE_INVALID')),
    ):
      objective, c.train.xla_options = toy.Toy(), ConfigDict(options)
      objective.convolutional = convolutional
      make_step(Plan(c, objective, next(toy.batches()), mesh))
      expected = (known if convolutional else {}) | {k: v for k, v in options.items() if 'no_such' not in k}
      assert used[-1] == expected
  assert 'config.train.xla_options.xla_no_such_option is left out' in capsys.readouterr().out


def test_parameters_that_are_split_over_data_are_accumulated_too(tmp_path):
  objective, states = toy.Toy(counts=False), []
  objective.rows_apart = True
  for accum, axes in ((1, 'fsdp'), (2, ('data', 'fsdp'))):
    c = toy.config(tmp_path / str(accum), accum=accum)
    c.mesh.update(data=2, fsdp=2, tensor=2)
    c.rules = (('batch', ('data', 'fsdp')), ('embed', axes))
    states.append(toy.run(c, objective))
  assert 'data' in states[1].params['net']['up']['kernel'].sharding.spec[0]
  close(*(s.params for s in states))


def test_replicas_draw_noise_of_their_own(tmp_path):
  class Dice(toy.Toy):
    rows_apart = True

    def loss(self, params, ctx, batch):
      loss, (values, mutable) = super().loss(params, ctx, batch)
      drawn = jax.nn.one_hot(jax.random.randint(ctx.rng, (), 0, 64), 64)
      return loss, (values | {f'drew_{i}': x for i, x in enumerate(drawn)}, mutable)

  c = toy.config(tmp_path, steps=1, log_every=1, accum=2)
  c.mesh.update(data=4, fsdp=2)
  toy.run(c, Dice(counts=False))
  (row,) = metrics.read(tmp_path / 'metrics.jsonl')
  drawn = [v for k, v in row.items() if k.startswith('drew_') and v]
  assert len(drawn) > 4 and sum(drawn) == pytest.approx(1)  # of eight; two, if replicas drew alike
  c.run_dir = str(tmp_path / 'other')
  with pytest.raises(ValueError, match='Dice has mutable state, seen, whose updates separate replicas would lose'):
    toy.run(c, Dice())


def test_accumulation_keeps_groups_together(tmp_path):
  class Pairs(toy.Toy):
    def loss(self, params, ctx, batch):
      loss, (values, mutable) = super().loss(params, ctx, batch)
      return loss, (values | {'together': (batch['ids'][0::2] == batch['ids'][1::2]).all().astype(float)}, mutable)

  def batches(start):
    for batch in toy.batches(start):
      yield {'ids': np.repeat(np.concatenate([batch['ids'], batch['ids'][:, ::-1]])[:16], 2, axis=0)}

  for group, together in ((2, 1.0), (1, 0.0)):
    c = toy.config(tmp_path / str(group), steps=1, accum=2)
    c.data.group = group
    toy.run(c, Pairs(), batches=batches)
    assert metrics.read(tmp_path / str(group) / 'metrics.jsonl')[0]['together'] == together


def test_ema_is_the_average(tmp_path):
  still = toy.config(tmp_path / 'still', steps=1)
  still.optim.lr = 0.0
  old = toy.run(still).params
  new = toy.run(toy.config(tmp_path, steps=1, ema=0.05))  # 0.05 < (1 + 0) / (10 + 0)
  close(jax.tree.map(lambda o, n: 0.05 * o + 0.95 * n, old, new.params), new.ema)
  same(checkpoint.load_run(tmp_path).params, new.ema)
  same(checkpoint.load_run(tmp_path, ema=False).params, new.params)


def test_groups_and_frozen_networks(tmp_path):
  c = toy.config(tmp_path)
  c.optim.groups = dict(critic=dict(frozen=True), net=dict(name='adafactor', lr=0.02))
  objective = toy.Toy(critic=True)
  objective.after_update = lambda params, mutable: {**params, 'critic': jax.tree.map(jnp.zeros_like, params['critic'])}
  state = toy.run(c, objective, frozen={'scale': jnp.ones(())})
  first = sharding.unbox(jax.jit(objective.init)(jax.random.key(0), next(toy.batches()))[0])
  close(first['critic'], state.params['critic'])
  assert all((a != b).any() for a, b in zip(*(jax.tree.leaves(p['net']) for p in (first, state.params)), strict=True))
  logged = metrics.read(tmp_path / 'metrics.jsonl')
  assert {'grad_norm', 'lr'} <= logged[-1].keys() and logged[0]['lr'] == 0.02
  one = metrics.read(tmp_path / 'metrics.jsonl')[0]['loss']
  toy.run(toy.config(tmp_path / 'doubled'), objective, frozen={'scale': 2 * jnp.ones(())})
  assert metrics.read(tmp_path / 'doubled' / 'metrics.jsonl')[0]['loss'] > 1.2 * one


@pytest.mark.parametrize('at', [4, 8])
def test_an_evaluation_that_a_run_has_ended_in_is_made_up_for(tmp_path, at):
  c, seen = toy.config(tmp_path, eval_every=4, log_every=4), []

  def ends_once(params, ctx):
    seen.append(int(ctx.step))
    if seen.count(at) == 1 and seen[-1] == at:
      raise KeyboardInterrupt
    return {'val': float(ctx.step)}

  with pytest.raises(KeyboardInterrupt):
    toy.run(c, evals=[ends_once])
  assert checkpoint.steps(tmp_path)[0] == at  # saved before
  assert int(toy.run(c, evals=[ends_once]).step) == 8
  lines = {m['step']: m.get('val') for m in metrics.read(tmp_path / 'metrics.jsonl')}
  assert lines == {4: 4.0, 8: 8.0} and seen == sorted([4, 8, at])
  toy.run(c, evals=[ends_once])
  assert len(seen) == 3  # complete


def test_evals_log_numbers_and_pictures(tmp_path):
  c = toy.config(tmp_path, eval_every=3, log_every=2, peak_flops=1e9)
  objective, mesh = toy.Toy(), sharding.make_mesh(c.mesh)
  toy.run(c, objective, evals=[e.build(objective, c, toy.batches, mesh) for e in (eval_loss, pictures)])
  logged = {m['step']: m for m in metrics.read(tmp_path / 'metrics.jsonl')}
  assert list(logged) == [2, 3, 4, 6, 8] and logged[6]['val_loss'] < logged[3]['val_loss']
  assert 'val_accuracy' in logged[3] and 'utilisation' in logged[4]
  assert (tmp_path / 'pictures' / 'samples_0000003.png').exists()


@pytest.mark.parametrize('name', ['steps', 'accum', 'log_every', 'keep'])
def test_counts_below_one_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match=f'train.{name} is 0; expected 1 or more'):
    toy.run(toy.config(tmp_path, **{name: 0}))


@pytest.mark.parametrize(
  'name, value, message',
  [
    ('checkpoint_every', -1, 'train.checkpoint_every is -1; expected 0 or more'),
    ('eval_every', -1, 'train.eval_every is -1; expected 0 or more'),
    ('ema', 1.0, 'train.ema is 1.0; expected 0 or more and less than 1'),
    ('ema', -0.5, 'train.ema is -0.5; expected 0 or more and less than 1'),
  ],
)
def test_numbers_out_of_range_are_refused(tmp_path, name, value, message):
  with pytest.raises(ValueError, match=message):
    toy.run(toy.config(tmp_path, **{name: value}))
  c = toy.config(tmp_path)
  c.init.new = '['
  with pytest.raises(ValueError, match=r"init.new '\[' is not a regular expression: unterminated character set"):
    toy.run(c)


def test_batch_that_does_not_divide_and_large_model_on_cpu(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r'batch_size 16 is not divisible by 8 .* x 3 .*nearest is 24'):
    toy.run(toy.config(tmp_path, accum=3))
  monkeypatch.setattr(loop, 'LARGE_ON_CPU', 100)
  with pytest.raises(ValueError, match=r'344 parameters would train on the CPU.*allow_cpu'):
    toy.run(toy.config(tmp_path))


def test_failing_save_is_one_line(tmp_path):
  """A limit on the file size stands in for a full disk."""
  code = 'import resource, sys; from tests.training import toy; toy.batches(); '
  code += 'resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); toy.run(toy.config(sys.argv[1], log_every=100))'
  done = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode and f'OSError: saving to {tmp_path}/checkpoints failed' in done.stderr, done.stderr


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
  class Full:
    """A manager whose save is in progress for one step and then fails, which it says once."""

    directory, pending, failed, closed = tmp_path / 'checkpoints', 0, False, False

    def save(self, step, args):
      self.pending, self.failed = 2, True

    def is_saving_in_progress(self):
      self.pending -= 1
      return self.pending > 0

    def wait_until_finished(self):
      if self.failed:
        self.failed = False
        raise ValueError('RESOURCE_EXHAUSTED: Error writing a file: No space left on device')

    def close(self):
      self.closed = True

  full = Full()
  monkeypatch.setattr(checkpoint, 'manager', lambda *_: full)
  with pytest.raises(OSError, match=r'^the disk is full: .*checkpoints has no room .*\(there is no checkpoint yet\)'):
    toy.run(toy.config(tmp_path, steps=100, checkpoint_every=10, log_every=1))
  assert full.closed and [line['step'] for line in metrics.read(tmp_path / 'metrics.jsonl')] == [*range(1, 12)]


@pytest.mark.parametrize('fails', ['data', 'loss', 'nothing'])
def test_the_first_error_is_raised_and_everything_is_closed(tmp_path, monkeypatch, capsys, fails):
  closed = []

  class Broken:
    """A manager whose save fails unnoticed until it is waited for."""

    directory = tmp_path / 'checkpoints'
    save = wait_until_finished = lambda *_, **__: None
    is_saving_in_progress = lambda _: True

    def close(self):
      closed.append('saves')
      raise ValueError('No space left on device')

  def close(writer):
    closed.append('writer')
    raise OSError('metrics.jsonl cannot be written')

  def batches(start):
    yield from itertools.islice(toy.batches(start), 3 if fails == 'data' else 99)
    raise KeyError('caption')

  monkeypatch.setattr(checkpoint, 'manager', lambda *_: Broken())
  monkeypatch.setattr(metrics.Writer, 'close', close)
  first, message = dict(
    data=(KeyError, 'caption'), loss=(loop.Diverged, 'at step 4; stopped'), nothing=(OSError, 'the disk is full')
  )[fails]
  with pytest.raises(first, match=message):
    toy.run(toy.config(tmp_path), toy.Toy(nan_at=3 if fails == 'loss' else -1), batches=batches)
  assert closed == ['saves', 'writer']
  warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
  expected = ['warning: the disk is full: ', 'warning: metrics.jsonl cannot be written'][fails == 'nothing' :]
  assert [a.startswith(b) for a, b in zip(warnings, expected, strict=True)] == [True] * len(expected)


def test_metrics_file_is_json_lines(straight):
  for line in (straight[1] / 'metrics.jsonl').read_text().splitlines():
    assert {'step', 'loss', 'accuracy', 'grad_norm', 'lr', 'tokens_per_second', 'seconds'} <= json.loads(line).keys()


def test_a_full_disk_ends_the_board_but_not_the_run(tmp_path, monkeypatch, capsys):
  def full(self, data):
    raise OSError(28, 'No space left on device')

  writer = metrics.Writer(tmp_path, 0)
  writer.write(1, {'loss': 1.0})
  monkeypatch.setattr(RecordWriter, 'write', full)
  for step in range(2, 40):  # more than the queue of tensorboardX's own writer holds
    writer.write(step, {'loss': 1.0})
  writer.image(40, 'samples', np.zeros((8, 8, 3), np.uint8))
  writer.close()
  metrics.Writer(tmp_path, 40).close()  # nor does a board that cannot even be opened
  assert len(metrics.read(tmp_path / 'metrics.jsonl')) == 39
  warning = (
    'warning: TensorBoard events cannot be written ([Errno 28] No space left on device); metrics.jsonl continues'
  )
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2 and all(line.startswith(warning) for line in lines)


def test_the_board_holds_scalars_images_and_where_a_resumed_run_begins(tmp_path):
  writer = metrics.Writer(tmp_path, 4)
  writer.write(6, {'loss': 0.5, 'val/loss': 2})
  writer.image(6, 'samples', np.zeros((8, 8, 3), np.uint8))
  writer.close()
  (file,) = (tmp_path / 'tb').iterdir()
  data, events = file.read_bytes(), []
  while data:  # records: length uint64, its checksum, an Event, its checksum
    size = int.from_bytes(data[:8], 'little')
    events.append(Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  version, start, *added = events
  assert version.file_version == 'brain.Event:2'
  assert start.step == 5 and start.session_log.status == SessionLog.START
  values = [value for e in added for value in e.summary.value]
  assert [v.tag for v in values] == ['loss', 'val/loss', 'samples'] and {e.step for e in added} == {6}
  assert values[0].simple_value == 0.5 and (values[2].image.height, values[2].image.width) == (8, 8)
