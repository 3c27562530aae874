"""Two processes do what one does, end together, and leave a checkpoint that any number of processes can resume."""

import functools
import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

import evaluate
import sample
import train
from dalle_jax.data import bpe
from dalle_jax.data.sources import shapes, tokens
from dalle_jax.models import clip, dalle, vqgan
from dalle_jax.pipelines import encode
from dalle_jax.training import checkpoint, distributed, errors, metrics, sharding
from tests import runs
from tests.runs import ROOT
from tests.training import toy

STEPS = 20
PATIENCE = 60  # seconds within which everything here must be over


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def start(*command, count=2, devices=2):
  """Starts `count` processes of `command`, with `devices` devices each."""
  env = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')}
  port, pipe = free_port(), subprocess.PIPE
  explicit = [f'--coordinator=localhost:{port}', f'--processes={count}']
  return [
    subprocess.Popen(
      [sys.executable, *command, *explicit, f'--process={i}'], cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe
    )
    for i in range(count)
  ]


def ends(processes):
  """(exit status, stdout, last line of stderr, all of stderr) of each process; none of them outlives the test."""
  try:
    texts = [p.communicate(timeout=PATIENCE) for p in processes]
  finally:
    for p in processes:
      p.kill()
  return [
    (p.returncode, out, (err.splitlines() or [''])[-1], err) for p, (out, err) in zip(processes, texts, strict=True)
  ]


def toys(path, event='', *flags):
  return start('-m', 'tests.training.process', str(path), str(STEPS), f'--event={event}', *flags)


def same(a, b, atol=1e-6):
  a, b = sharding.flatten(a), sharding.flatten(b)
  assert a.keys() == b.keys()
  for k in a:
    np.testing.assert_allclose(np.asarray(a[k]), np.asarray(b[k]), atol=atol, rtol=0, err_msg=k)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The last state of an uninterrupted run of one process."""
  return toy.run(toy.config(tmp_path_factory.mktemp('straight'), steps=STEPS))


def params(path):
  return checkpoint.load_run(path, ema=False).params


SCORE_AND_ENCODE = """
import sys
import evaluate, sample
from configs import common
from dalle_jax.data.sources import shapes
from dalle_jax.pipelines import encode
from dalle_jax.training import checkpoint, sharding
from tests import runs
if __name__ == '__main__':
  root, *scoring = sys.argv[1:]
  assert runs.call(evaluate, *scoring) == 0
  with sharding.use(common.MESHES['data'], common.RULES) as mesh:
    run = checkpoint.load_run(f'{root}/vqgan', mesh=mesh, rules=common.RULES)
    encode.encode_dataset(shapes.load('train', image_size=24, count=11), run, f'{root}/two_encoded', 24, 8)
  print('encoded')
  sys.exit(runs.call(sample, f'--run={root}/dalle', '--prompt=a'))
"""


def test_two_processes_draw_score_and_encode_ahead_what_one_does(tmp_path):
  """Over one mesh; process 0 writes. Each reads half of the images to encode."""
  words, text = bpe.train(['a red heart'] * 3, 300), np.zeros((1, 6), np.int32)
  c = {'data': {'image_size': 24}, 'tokenizer': {'vocab_size': words.vocab_size, 'length': 6}}
  picture = np.zeros((1, 24, 24, 3), np.float32)
  write = functools.partial(runs.write, words=words)
  write(tmp_path / 'vqgan', 'vqgan', vqgan.build(**runs.VQGAN), c | {'model': runs.VQGAN}, picture)
  c['model'] = {'variant': 'test'}
  write(tmp_path / 'clip', 'clip', clip.of_run(c), c, picture, text)
  c['model'] = runs.DALLE
  model = dalle.build(**runs.DALLE, text_vocab=words.vocab_size + 6)
  write(tmp_path / 'dalle', 'dalle', model, c, text, np.zeros((1, 16), np.int32), frozen=['vqgan'])

  asked, over = [f'--run={tmp_path}/dalle', f'--clip={tmp_path}/clip', '--n=3'], '--mesh=data=2,tensor=2'
  drawing = [*asked, '--prompt=a red heart', '--prompt=b', '--prompt=a']
  running = start('sample.py', *drawing, over, f'--out={tmp_path}/two')
  assert runs.call(sample, *drawing, '--out', tmp_path / 'one') == 0
  first, second = ends(running)
  assert (first[0], second[0]) == (0, 0), first[3] + second[3]
  assert 'devices: 4 x cpu' in first[1] and 'wrote 9 images' in first[1] and 'devices' not in second[1]
  scoring = [*asked, '--source=shapes', '--split=val', '--count=3']
  running = start('-c', SCORE_AND_ENCODE, str(tmp_path), *scoring, over, f'--out={tmp_path}/two_scored', '--save_true')
  data, run = shapes.load('train', image_size=24, count=11), checkpoint.load_run(tmp_path / 'vqgan')
  encode.encode_dataset(data, run, tmp_path / 'one_encoded', 24, 8)
  first, second = ends(running)
  assert 'encoded' in first[1] and (first[0], second[0]) == (2, 2), first[3] + second[3]
  assert 'several processes sample over one mesh; give it, e.g. --mesh data=-1' in first[3]
  again = f'--fid_reference={tmp_path}/two_scored/true.npz'
  assert runs.call(evaluate, *scoring, again, '--out', tmp_path / 'one_scored') == 0

  for name in ('000_0.png', '000_2.png', '001_1.png'):
    two, one = (np.asarray(Image.open(tmp_path / k / name), int) for k in ('two', 'one'))
    np.testing.assert_allclose(two, one, atol=1)
  two, one = (json.loads((tmp_path / k / 'metrics.json').read_text()) for k in ('two_scored', 'one_scored'))
  assert two['clip_score'] == pytest.approx(one['clip_score'], abs=1e-3)
  assert two['fid'] == pytest.approx(one['fid'], rel=0.05)
  one, two = (tokens.Tokens(tmp_path / f'{name}_encoded') for name in ('one', 'two'))
  assert len(one) == len(two) == 11
  for i in range(11):
    assert one[i]['captions'] == two[i]['captions'] and (one[i]['tokens'] == two[i]['tokens']).all()


LAYOUT = """
import sys, time
import jax
from absl import flags
from configs import common
from dalle_jax.training import layout
values = flags.FlagValues()
layout.define_flags(values)
flags.DEFINE_integer('seed', 0, '', flag_values=values)
values(sys.argv)
values.seed = values.process
try:
  with layout.asked(values, common.MESHES['data'], common.RULES):
    print('not refused')
except ValueError as e:
  print(e, file=sys.stderr)
values.seed, values.coordinator, values.processes, values.process = 0, '', 0, -1  # they have joined
for seconds in (4, 0):
  with layout.asked(values, common.MESHES['data'], common.RULES):
    time.sleep(seconds if jax.process_index() == 0 else 0)
    print('written')
"""


def test_flags_are_those_of_all_and_who_writes_may_take_its_time():
  first, second = ends(start('-c', LAYOUT, '--mesh=data=-1', '--silence=2'))
  assert (first[0], second[0]) == (0, 0), first[3] + second[3]
  assert 'differ in --seed' in first[3] and 'differ in --seed' in second[3] and 'not refused' not in first[1]
  assert 'written' in first[1]


def test_two_processes_equal_one_and_stop_where_they_read_other_rows(tmp_path, straight):
  """Also where they share layers, for which they must read the same rows."""
  first, second = ends(toys(tmp_path, 'skip:1:0', '--mesh=data,across,across'))
  assert 'devices: 4 x cpu' in first[1] and 'step' not in second[1]  # only process 0 prints
  assert checkpoint.steps(tmp_path / '0') and checkpoint.steps(tmp_path / '1'), first[3] + second[3]
  for name in ('0', '1'):
    same(params(tmp_path / name), straight.params)
    same(checkpoint.load_run(tmp_path / name).params, straight.ema)
    assert [m['step'] for m in metrics.read(tmp_path / name / 'metrics.jsonl')] == list(range(1, STEPS + 1))
  assert (first[0], second[0]) == (2, 2) and not checkpoint.steps(tmp_path / '2')
  assert 'the processes differ in the records that they could not read' in first[3] + second[3]


@pytest.mark.parametrize(
  ('text', 'loss'),
  [
    ('UNAVAILABLE: Connection reset by peer', True),
    ('INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error', True),
    ('FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: Read timeout', True),
    ('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes', False),
    ('INVALID_ARGUMENT: Executable expected shape f32[2]', False),
    ('INTERNAL: ptxas exited with non-zero error code 2', False),
  ],
)
def test_what_starting_again_does_not_mend_is_no_loss_of_a_process(monkeypatch, text, loss):
  monkeypatch.setattr(distributed, 'joined', lambda: True)
  assert distributed.is_loss(jax.errors.JaxRuntimeError(text)) == loss


def test_kubernetes_starts_no_pod_again_that_would_fail_again():
  *_, job = yaml.safe_load_all((ROOT / 'launch' / 'kubernetes.yaml').read_text())
  codes = {
    r['action']: r['onExitCodes']['values'] for r in job['spec']['podFailurePolicy']['rules'] if 'onExitCodes' in r
  }
  assert codes == {'FailJob': [1, 2, errors.DIVERGED], 'Ignore': [errors.STOPPED]}


def test_a_run_that_loses_processes_again_and_again_equals_one_left_alone(tmp_path, straight):
  """One process, two with an error, two with a kill, two with a SIGTERM, one again."""

  def four(start):
    for step, batch in zip(range(start, 99), toy.batches(start), strict=False):
      if step == 6:
        raise KeyboardInterrupt
      yield batch

  with pytest.raises(KeyboardInterrupt):
    toy.run(toy.config(tmp_path, steps=STEPS), batches=four)
  assert checkpoint.steps(tmp_path) == [4]

  first, second = ends(toys(tmp_path, 'bad:1:7', '--mesh=fsdp'))
  assert (first[0], second[0]) == (2, 2), first[3] + second[3]
  assert second[2] == 'error: process 1 of 2: the data of this process are bad'
  assert first[2].startswith(
    'error: process 0 of 2: process 1 of 2: the data of this process are bad; the checkpoint of'
  )
  assert 'resuming at step 4' in first[1] and checkpoint.steps(tmp_path) == [4]

  first, second = ends(toys(tmp_path, 'KILL:0:7'))  # the store that joins the processes goes with it
  assert (first[0], second[0]) == (-9, 75), first[3] + second[3]
  assert 'process 1 of 2: ' in second[2] and 'the checkpoint of step 4 is kept. Start all' in second[2], second[3]

  first, second = ends(toys(tmp_path, 'TERM:1:10', '--mesh=fsdp'))
  assert (first[0], second[0]) == (143, 143), first[3] + second[3]
  stopped = checkpoint.steps(tmp_path)[0]
  assert f'stopped at step {stopped} and saved' in first[1] and 10 <= stopped < STEPS

  same(toy.run(toy.config(tmp_path, steps=STEPS)).params, straight.params)


def test_a_silent_process_ends_the_others(tmp_path):
  """One that stands still; of one that was killed, the network may tell first."""
  begun, (first, second) = time.monotonic(), toys(tmp_path, 'STOP:1:7', '--silence=3')
  try:
    ((status, _, line, err),) = ends([first])
  finally:
    second.kill()
  assert status == 75 and line.startswith('error: process 0 of 2: the others are gone, have been silent'), err
  assert f'{checkpoint.describe_newest(tmp_path)}. Start all' in line
  assert time.monotonic() - begun < 45


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--processes=2', '--process=0'], 'missing --coordinator; give --coordinator=HOST:PORT, --processes=N and'),
    (['--coordinator=here', '--processes=2', '--process=0'], "--coordinator 'here' is not a HOST:PORT"),
    (['--coordinator=here:1', '--processes=2', '--process=2'], '--process 2 is not one of 2'),
    ([f'--coordinator=localhost:{free_port()}', '--processes=2', '--process=1', '--join_timeout=1'], 'within 1 s'),
  ],
)
def test_flags_that_join_nobody_are_one_line(tmp_path, capsys, flags, message):
  config = f'--config={ROOT}/configs/folder.py:vqgan'
  assert train.main(['train.py', config, f'--config.run_dir={tmp_path}', *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_process_0_is_found_at_an_ipv6_address(monkeypatch):
  asked = []
  monkeypatch.setattr(socket, 'create_connection', lambda address, timeout: asked.append(address) or socket.socket())
  distributed._reach('[::1]', 7733, 1)
  assert asked == [('::1', 7733)]


def test_train_with_an_objective_evaluation_and_pictures(tmp_path):
  """The CLIP of the quickstart: tokenizer, data, evaluation and checkpoints of two processes equal those of one."""
  command = ['train.py', '--config=configs/quickstart.py:clip']
  model, data = (
    {'variant': 'test', 'patch': 9, 'layers': 1, 'text_layers': 1},
    {'batch_size': 16, 'source_args.count': 64},
  )
  often = {'steps': 2, 'log_every': 1, 'eval_every': 2, 'eval_batches': 2, 'ema': 0}
  parts = dict(model=model, data=data, train=often, optim={'name': 'sgd'})
  small = {f'{k}.{name}': v for k, d in parts.items() for name, v in d.items()}
  options = [f'--config.{k}={v}' for k, v in small.items()]
  running = start(*command, *options, f'--config.root={tmp_path}/two', devices=1)
  with runs.one_device():
    assert train.main([*command, *options, f'--config.root={tmp_path}/one']) == 0
  first, second = ends(running)
  assert (first[0], second[0]) == (0, 0), first[3] + second[3]
  one, two = (metrics.read(tmp_path / n / 'clip' / 'metrics.jsonl') for n in ('one', 'two'))
  assert [m['step'] for m in one] == [m['step'] for m in two] == [1, 2] and 'val_loss' in two[1]
  for a, b in zip(one, two, strict=True):
    assert {k: b[k] for k in a if 'loss' in k} == pytest.approx({k: a[k] for k in a if 'loss' in k}, rel=1e-4)
