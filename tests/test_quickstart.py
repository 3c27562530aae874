"""The quickstart without its stages: its report, its flags, and how it ends when a stage fails."""

import pytest

import quickstart
from dalle_jax.evals.oracle import COLUMNS
from tests import runs


def test_the_report_tells_of_every_run_that_was_scored():
  metrics = {f'vqgan/{k}': 0.5 for k in ('recon_correct',)}
  metrics |= {f'dalle/correct{s}{best}': 0.5 for s in ('', '_unseen') for best in ('', '_best_of_8')}
  for variant in ('full', 'storyganc'):
    metrics[f'story/{variant}/sampling_s'] = 0.017
    for split in ('test_seen', 'test_unseen'):
      metrics |= {f'story/{variant}/{split}/{c}': 0.25 for c in (*COLUMNS, 'setting_silent')}
  quickstart.FLAGS(['quickstart.py'])
  report = quickstart.report(metrics)
  cells = ' | '.join(['25.0%'] * 5)
  for variant in ('full', 'storyganc'):
    assert f'| {variant} | `test_unseen` | {cells} | 17 ms |' in report
  assert 'no_retro' not in report


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--prompts=0', '--prompts=0'),
    ('--prompts=2001', '--prompts=2001'),
    ('--candidates=0', '--candidates=0'),
    ('--stories=0', '--stories=0'),
    ('--temperature=-1', 'temperature -1.0 is negative'),
    ('--temperature=nan', 'temperature is nan'),
    ('--guidance=inf', 'guidance is inf'),
    ('more', "arguments ['more'] are not understood"),
  ],
)
def test_mistakes_are_one_line_before_anything_is_trained(flag, message, monkeypatch, capsys):
  monkeypatch.setattr(quickstart.subprocess, 'Popen', lambda *_, **__: pytest.fail('trained'))
  assert runs.call(quickstart, flag) == 2
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1


@pytest.mark.parametrize(('code', 'message'), [(143, 'the same command resumes'), (2, 'ended with exit code 2')])
def test_a_stage_that_fails(code, message, monkeypatch, tmp_path):
  child = tmp_path / 'train.py'
  child.write_text(f'import sys; sys.exit({code})')
  monkeypatch.setattr(quickstart, 'ROOT', tmp_path)
  monkeypatch.chdir('/')  # any directory will do
  with pytest.raises(SystemExit, match=message):
    runs.call(quickstart, '--run_dir', tmp_path / 'run')
