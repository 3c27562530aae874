"""Compiles the training step and the sampler of a config for TPUs or GPUs that need not be present.

Prints whether they fit into memory, and how fast they are at best.

  python -m dalle_jax.aot --config configs/dalle_paper.py:12b,tpu --topology v5p:8x8x4
  python -m dalle_jax.aot --config configs/dalle_paper.py:1.3b --topology v5e:4x4 --batch_per_chip 8 \\
    --config.mesh.tensor=2
  python -m dalle_jax.aot --config configs/dalle_paper.py:1.3b --topology v5e:4x4 --program sampler --pictures 8 \\
    --config.mesh.data=-1 --config.mesh.fsdp=1
  python -m dalle_jax.aot --config configs/unclip_paper.py:unclip --topology v5e:16x16 --program step
  python -m dalle_jax.aot --config configs/dalle_paper.py:1.3b --topology h200:2x8    # two nodes of eight GPUs
  python -m dalle_jax.aot --config configs/finetune_dalle_mini.py --config.model.variant=mega --topology h200:8
A config that starts from a run (`init.path`) has the sizes of that run, or without it those of `model.variant`.
Needs the compiler for TPUs (pip install -e ".[aot]") or GPUs (`[cuda]`). Exits with status 1 if a program does not fit.
docs/scaling.md describes how far the estimates can be trusted. `--debug` shows tracebacks.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence

import jax
from absl import flags

from dalle_jax.aot import machines, roofline
from dalle_jax.aot.program import Program, Programs
from dalle_jax.training import config as config_lib
from dalle_jax.training import errors, metrics, sharding

GB = 1e9
SAMPLED = ('dalle', 'dalle_mini')  # objectives with a pipeline whose sampler is one program
PROGRAMS = ('step', 'sampler')


def own_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_string('topology', '', f'TPUs or GPUs to compile for: {machines.EXAMPLES}', flag_values=values)
  flags.DEFINE_string('clip', 'vit_l14', 'variant of the frozen CLIP', flag_values=values)
  flags.DEFINE_integer('batch_per_chip', 0, "data.batch_size / chips; 0: the config's batch", 0, flag_values=values)
  text = "variant of the frozen VQGAN; '': that of the run to start from, or else one that fits the model"
  flags.DEFINE_string('vqgan', '', text, flag_values=values)
  flags.DEFINE_multi_enum('program', PROGRAMS, PROGRAMS, 'what to compile; can be repeated', flag_values=values)
  flags.DEFINE_integer('pictures', 1, 'images per chip that the sampler generates at once', 1, flag_values=values)
  flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=values)
  return values


def check(
  config,
  devices: Sequence[jax.Device],
  *,
  vqgan: str = '',
  clip: str = '',
  batch_per_chip: int = 0,
  programs: Sequence[str] = PROGRAMS,
  pictures: int = 1,
) -> bool:
  """Compiles the programs, prints a report and returns whether all fit. Raises ValueError for an impossible request."""
  if 'step' not in programs and config.objective not in SAMPLED:
    raise ValueError(
      f'the sampler is compiled only for the objectives {" and ".join(SAMPLED)}, not for {config.objective}; use '
      '--program step.'
    )
  with sharding.use(config.mesh, config.rules, devices) as mesh:
    plan = Programs(config, mesh, vqgan_variant=vqgan, clip_variant=clip, batch_per_chip=batch_per_chip)
    shape = ', '.join(f'{k} {v}' for k, v in mesh.shape.items())
    print(f'{mesh.size} x {devices[0].device_kind}, mesh {shape}')
    print(*plan.describe(), sep='\n')
    if plan.replicated > 0.01:
      print(f'every chip holds {100 * plan.replicated:.0f}% of them whole: the mesh does not split these')
    size = next(iter(plan.batch.values())).shape[0]
    note = ', tokens encoded in advance, so the step does not run the VQGAN' if 'tokens' in plan.batch else ''
    print(f'batch {size:,}, {size / mesh.size:g} per chip{note}', flush=True)
    fits = report(plan, plan.step(), mesh) if 'step' in programs else True
    if 'sampler' in programs and config.objective in SAMPLED:
      fits &= report(plan, plan.sampler(pictures), mesh)
  return fits


def report(plan: Programs, program: Program, mesh: jax.sharding.Mesh) -> bool:
  """Prints what a program needs and, for a known chip, how long it takes; returns whether it fits."""
  device, network = mesh.devices.flat[0], machines.network(mesh.devices.flat)
  chip, peak = network.chip if network else None, metrics.peak_flops(device)
  print(f'--- {program.name}, compiled in {program.seconds:.0f} s')
  if program.needs:
    print(f'does not fit: it needs {program.needs} of memory per chip; use more chips, a smaller batch, or remat.')
    return False
  fits = chip is None or program.bytes <= chip.hbm
  parts = f'arguments {program.arguments / GB:.2f}, other {(program.bytes - program.arguments) / GB:.2f}'
  if chip:
    verdict = 'fits' if fits else 'DOES NOT FIT'
    parts += f'; {100 * program.bytes / chip.hbm:.0f}% of {chip.hbm / GB:.1f} GB, {verdict}'
  print(f'{"memory per chip":<16}{program.bytes / GB:.2f} GB: {parts}')
  flops = sum(r.times * r.flops for r in program.regions)
  model = 0.0  # FLOPs of the model, if known
  if program.name == 'step' and hasattr(plan.objective, 'flops'):
    model = plan.objective.flops(plan.batch) / mesh.size
  ratio = f', {flops / model:.2f} times the model FLOPs, {model:.3e}' if model else ''
  print(f'{"FLOPs per chip":<16}{flops:.3e}{ratio}')
  print_collectives(program, network)
  if network:
    e = roofline.estimate(program.regions, network, peak)
    print(
      f'{"estimate":<16}{e.total:.3f} s: products {e.compute:.3f}, memory {e.memory:.3f}, network {e.network:.3f} '
      f'of which {e.exposed:.3f} not overlapped; {e.operations:,} operations'
    )
    if model:
      print(f'{"utilisation":<16}{100 * model / (peak * e.total):.0f}% at most, of {peak / 1e12:.0f} TFLOP/s')
  return fits


def print_collectives(program: Program, network: machines.Interconnect | None) -> None:
  """Prints one line for each kind, group size, and whether it can overlap with other operations."""
  sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
  for region in program.regions:
    for c in region.collectives:
      row = sums[c.kind, len(c.groups[0]), c.hidden]
      row[0] += region.times
      row[1] += region.times * c.sent
      row[2] += region.times * network.seconds(c) if network else 0.0
  for (kind, group, hidden), (count, sent, seconds) in sorted(sums.items(), key=lambda item: -item[1][1]):
    mode = 'asynchronous' if hidden else 'synchronous'
    time = f', {seconds:.3f} s' if network else ''
    print(f'  {kind:<20}{mode:<14} over {group:<5} {count:>7,} times {sent / GB:>9.3f} GB sent per chip{time}')


def main(argv: list[str]) -> int:
  options = own_flags()
  if {'-h', '--help'} & set(argv[1:]):
    print(f'{__doc__}\n{options.main_module_help()}')
    return 0
  jax.config.update('jax_platforms', 'cpu')  # nothing runs, so the accelerator of this machine is not claimed
  try:
    config = config_lib.parse(argv, options)
    if config.stages:
      raise ValueError(
        f'this config has the stages {", ".join(config.stages)}; choose one with --config FILE.py:STAGE.'
      )
    devices = machines.devices_of(options.topology)
    config = config.copy_and_resolve_references()
    names = ('vqgan', 'clip', 'batch_per_chip', 'pictures')
    fits = check(config, devices, programs=options.program, **{name: options[name].value for name in names})
  except errors.EXPECTED as e:
    return errors.report(e, '--debug' in argv)
  except KeyboardInterrupt:
    return errors.interrupted('stopped.')
  return 0 if fits else 1


if __name__ == '__main__':
  errors.leave(main(sys.argv))
