"""How long a compiled program takes at best, from what its regions compute, move and send.

A region (the entry, the body of a loop) takes, each time it runs, max(FLOPs / peak, bytes / bandwidth of the memory,
what is sent while it computes / bandwidth of the links) + what is sent while nothing else runs / bandwidth of the
links. No operation reaches the peaks, so a measured step is slower; what the estimate is good for is whether a mesh is
bound by its network, and how that grows with the number of chips.
"""

import dataclasses
from collections.abc import Sequence

from dalle_jax.aot.costs import Region
from dalle_jax.aot.machines import Network


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run of the program; `exposed` is how much longer it takes than without a network."""

  compute: float
  memory: float
  network: float
  exposed: float
  total: float


def estimate(regions: Sequence[Region], machine: Network, peak: float) -> Estimate:
  """The time of all regions; `peak` FLOP/s of a chip."""
  compute = memory = network = alone = total = 0.0
  for region in regions:
    products, traffic = region.flops / peak, region.bytes / machine.chip.bandwidth
    hidden = sum(machine.seconds(c) for c in region.collectives if c.hidden)
    waiting = sum(machine.seconds(c) for c in region.collectives if not c.hidden)
    compute += region.times * products
    memory += region.times * traffic
    network += region.times * (hidden + waiting)
    alone += region.times * max(products, traffic)
    total += region.times * (max(products, traffic, hidden) + waiting)
  return Estimate(compute, memory, network, total - alone, total)
