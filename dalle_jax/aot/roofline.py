"""A lower bound on the time of a compiled program, from what its regions compute, move and send.

One run of a region (the entry or the body of a loop) takes

  max(time of its operations, time of the collectives that overlap with them) + time of the other collectives

Operations take max(FLOPs / peak, bytes / memory bandwidth): for all of them together on a TPU, which moves data while
it computes, and for each one on a GPU, whose kernels run one after the other. Collectives take bytes sent / link
bandwidth. No operation reaches the peaks, so a measured step is slower. What the estimate shows is whether a mesh is
bound by its network, and how that grows with the number of chips.
"""

import dataclasses
from collections.abc import Sequence

from dalle_jax.aot.costs import Region
from dalle_jax.aot.machines import Interconnect


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run of the program; `exposed` is how much longer it takes than with an infinitely fast network.

  `operations` is the number of operations that run; a GPU needs some microseconds more for each.
  """

  compute: float
  memory: float
  network: float
  exposed: float
  total: float
  operations: int


def estimate(regions: Sequence[Region], machine: Interconnect, peak: float) -> Estimate:
  """Estimates the time of all regions; `peak` is the FLOP/s of one chip."""
  compute = memory = network = local = total = 0.0
  seconds = lambda flops, moved: max(flops / peak, moved / machine.chip.bandwidth)
  for region in regions:
    operations = [(region.flops, region.bytes)] if machine.overlaps else region.each
    busy = sum(seconds(*both) for both in operations)
    hidden = sum(machine.seconds(c) for c in region.collectives if c.hidden)
    waiting = sum(machine.seconds(c) for c in region.collectives if not c.hidden)
    compute += region.times * region.flops / peak
    memory += region.times * region.bytes / machine.chip.bandwidth
    network += region.times * (hidden + waiting)
    local += region.times * busy
    total += region.times * (max(busy, hidden) + waiting)
  count = sum(region.times * len(region.each) for region in regions)
  return Estimate(compute, memory, network, total - local, total, count)
