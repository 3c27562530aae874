"""How long a compiled program takes at best on TPUs, from what its regions compute, move and send.

A region (the entry, the body of a loop) takes, each time it runs, max(FLOPs / peak, bytes / HBM bandwidth, what is
sent while it computes / bandwidth of the links) + what is sent while nothing else runs / bandwidth of the links. No
operation reaches the peaks, so a measured step is slower; what the estimate is good for is whether a mesh is bound by
its network, and how that grows with the number of chips.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import jax

from dalle_jax.aot.hlo import Collective, Region


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip, by its page in cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); FLOP/s are in `training.metrics`.

  Attributes:
    hbm: bytes of memory.
    bandwidth: bytes/s of memory.
    link: bytes/s that a chip sends over one link to a neighbour; each axis of the torus has two.
    ring: chips after which an axis closes to a ring; a multiple of it does, too.
  """

  hbm: int
  bandwidth: float
  link: float
  ring: int


CHIPS = {  # by a part of jax.Device.device_kind, first match wins
  'TPU v6 lite': Chip(32 * 2**30, 1638e9, 100e9, 16),
  'TPU v5 lite': Chip(16 * 2**30, 819e9, 50e9, 16),
  'TPU v5': Chip(95 * 2**30, 2765e9, 100e9, 4),
  'TPU v4': Chip(32 * 2**30, 1228e9, 50e9, 4),
}


def chip(device: jax.Device) -> Chip | None:
  """The chip of a device, None when it is no TPU of the table."""
  return next((found for kind, found in CHIPS.items() if kind in device.device_kind), None)


@dataclasses.dataclass(frozen=True)
class Torus:
  """Where the devices of a program lie, in the order of the program: `places` (x, y, z), of a torus of `shape`."""

  chip: Chip
  shape: tuple[int, ...]
  places: tuple[tuple[int, ...], ...]

  @classmethod
  def of(cls, devices: Sequence[jax.Device]) -> 'Torus':
    places = tuple(tuple(d.coords) for d in devices)
    return cls(chip(devices[0]), tuple(max(axis) + 1 for axis in zip(*places, strict=True)), places)

  def seconds(self, collective: Collective) -> float:
    """Of one collective alone: what each chip sends, over both links of every axis that its groups cover as rings.

    Of an axis that does not close to a ring one link counts, as a chip at the end has no other. A permutation takes as
    long as its busiest link, where every pair goes along one axis after the other.
    """
    if collective.kind == 'collective-permute':
      return self._busiest(collective.groups) * collective.bytes / self.chip.link
    places = [self.places[i] for i in collective.groups[0]]
    links = 0
    for axis, size in enumerate(self.shape):
      covered = len({place[axis] for place in places})
      links += (covered > 1) + (covered == size and self._closes(size))
    return collective.sent / (self.chip.link * max(links, 1)) if len(places) > 1 else 0.0

  def _closes(self, size: int) -> bool:
    return size > 1 and size % self.chip.ring == 0

  def _busiest(self, pairs: tuple[tuple[int, ...], ...]) -> int:
    """How many pairs the busiest link serves."""
    load: Counter = Counter()
    for start, end in pairs:
      at = list(self.places[start])
      for axis, size in enumerate(self.shape):
        away = self.places[end][axis] - at[axis]
        if self._closes(size):
          away = (away + size // 2) % size - size // 2
        for _ in range(abs(away)):
          step = 1 if away > 0 else -1
          load[tuple(at), axis, step] += 1
          at[axis] = (at[axis] + step) % size
    return max(load.values(), default=0)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run of the program; `exposed` is how much longer it takes than without a network."""

  compute: float
  memory: float
  network: float
  exposed: float
  total: float


def estimate(regions: Sequence[Region], torus: Torus, peak: float) -> Estimate:
  """The time of all regions; `peak` FLOP/s of a chip."""
  compute = memory = network = alone = total = 0.0
  for region in regions:
    products, traffic = region.flops / peak, region.bytes / torus.chip.bandwidth
    hidden = sum(torus.seconds(c) for c in region.collectives if c.hidden)
    waiting = sum(torus.seconds(c) for c in region.collectives if not c.hidden)
    compute += region.times * products
    memory += region.times * traffic
    network += region.times * (hidden + waiting)
    alone += region.times * max(products, traffic)
    total += region.times * (max(products, traffic, hidden) + waiting)
  return Estimate(compute, memory, network, total - alone, total)
