"""How long a compiled program takes at best, from what its regions compute, move and send.

A region (the entry, the body of a loop) takes, each time it runs, what its operations take or, where that is longer,
what is sent while they run / bandwidth of the links; and what is sent while nothing else runs / bandwidth of the links.
Operations take max(FLOPs / peak, bytes / bandwidth of the memory): on a TPU all together, as it moves data while it
computes, on a GPU each by itself, as its kernels run one after the other. No operation reaches the peaks, so a measured
step is slower; what the estimate is good for is whether a mesh is bound by its network, and how that grows with the
number of chips.
"""

import dataclasses
from collections.abc import Sequence

from dalle_jax.aot.costs import Region
from dalle_jax.aot.machines import Interconnect


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run of the program; `exposed` is how much longer it takes than without a network.

  `operations` is how many run, for each of which a GPU takes some microseconds more.
  """

  compute: float
  memory: float
  network: float
  exposed: float
  total: float
  operations: int


def estimate(regions: Sequence[Region], machine: Interconnect, peak: float) -> Estimate:
  """The time of all regions; `peak` FLOP/s of a chip."""
  compute = memory = network = alone = total = 0.0
  seconds = lambda flops, moved: max(flops / peak, moved / machine.chip.bandwidth)
  for region in regions:
    together = [(region.flops, region.bytes)]
    busy = sum(seconds(*both) for both in (together if machine.overlaps else region.each))
    hidden = sum(machine.seconds(c) for c in region.collectives if c.hidden)
    waiting = sum(machine.seconds(c) for c in region.collectives if not c.hidden)
    compute += region.times * region.flops / peak
    memory += region.times * region.bytes / machine.chip.bandwidth
    network += region.times * (hidden + waiting)
    alone += region.times * busy
    total += region.times * (max(busy, hidden) + waiting)
  operations = sum(region.times * len(region.each) for region in regions)
  return Estimate(compute, memory, network, total - alone, total, operations)
