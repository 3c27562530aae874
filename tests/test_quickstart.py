"""The report of the quickstart has a row for every story run that was scored."""

import quickstart
from dalle_jax.evals.oracle import COLUMNS


def test_the_report_tells_of_every_run_that_was_scored():
  metrics = {f'vqgan/{k}': 0.5 for k in ('recon_correct',)}
  metrics |= {f'dalle/correct{s}{best}': 0.5 for s in ('', '_unseen') for best in ('', '_best_of_8')}
  for variant in ('full', 'storyganc'):
    metrics[f'story/{variant}/sampling_s'] = 0.017
    for split in ('test_seen', 'test_unseen'):
      metrics |= {f'story/{variant}/{split}/{c}': 0.25 for c in (*COLUMNS, 'setting_silent')}
  report = quickstart.report(metrics)
  cells = ' | '.join(['25.0%'] * 5)
  for variant in ('full', 'storyganc'):
    assert f'| {variant} | `test_unseen` | {cells} | 17 ms |' in report
  assert 'no_retro' not in report
