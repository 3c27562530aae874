"""Accelerators that need not be present: TPUs in a torus and GPUs in nodes, with figures from their data sheets."""

import dataclasses
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import jax
from jax.experimental import topologies

from dalle_jax.aot.costs import Collective

EXAMPLES = 'v5e:4x4, v6e:16x16, v5p:8x8x4, h100:8, h200:4x8'


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip, from its page at cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); FLOP/s are in `training.metrics`.

  Attributes:
    hbm: bytes of memory.
    bandwidth: bytes/s of memory.
    link: bytes/s that a chip sends over one link to a neighbour; it has two links along each axis of the torus.
    ring: an axis whose length is a multiple of this closes to a ring.
  """

  hbm: int
  bandwidth: float
  link: float
  ring: int


CHIPS = {  # part of jax.Device.device_kind -> chip; the first match counts
  'TPU v6 lite': Chip(32 * 2**30, 1638e9, 100e9, 16),
  'TPU v5 lite': Chip(16 * 2**30, 819e9, 50e9, 16),
  'TPU v5': Chip(95 * 2**30, 2765e9, 100e9, 4),
  'TPU v4': Chip(32 * 2**30, 1228e9, 50e9, 4),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
  """An NVIDIA GPU, from its data sheet; the fields after `nic` are those that its compiler asks for.

  Attributes:
    memory: bytes.
    bandwidth: bytes/s of memory.
    link: bytes/s that it sends to other GPUs of its node (NVLink; data sheets give the sum of both directions).
    nic: bytes/s that it sends to other nodes, with one network card per GPU.
    capability: major version of CUDA's compute capability.
    cores, lanes: multiprocessors, and float32 units per multiprocessor.
    clock: in GHz.
    cache: bytes of L2 cache.
    near: bytes of shared memory per multiprocessor.
  """

  name: str
  memory: int
  bandwidth: float
  link: float
  nic: float
  capability: int
  cores: int
  lanes: int
  clock: float
  cache: int
  near: int

  @property
  def hbm(self) -> int:
    """Bytes of memory that JAX allocates: the fraction XLA_CLIENT_MEM_FRACTION, by default three quarters."""
    old_name = os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION')
    fraction = os.environ.get('XLA_CLIENT_MEM_FRACTION') or old_name or 0.75
    return int(self.memory * float(fraction))

  @property
  def target(self) -> str:
    """The GPU as XLA's GpuTargetConfigProto, in text format."""
    return f"""
      platform_name: "CUDA" device_description_str: "{self.name}" dnn_version_info {{ major: 9 minor: 10 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {self.capability} }}
        core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
        device_memory_size: {self.memory} memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.cache}
        shared_memory_per_core: {self.near} shared_memory_per_block: 49152
        shared_memory_per_block_optin: {self.near - 1024}
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
      }}"""


GPUS = {
  'a100': Gpu('NVIDIA A100 80GB', 85_100_068_864, 2039e9, 300e9, 25e9, 8, 108, 64, 1.41, 40 * 2**20, 164 * 2**10),
  'h100': Gpu('NVIDIA H100 80GB', 84_942_979_072, 3352e9, 450e9, 50e9, 9, 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
  'h200': Gpu('NVIDIA H200', 151_397_597_184, 4800e9, 450e9, 50e9, 9, 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
  'b200': Gpu('NVIDIA B200', 191_514_411_008, 7672e9, 900e9, 50e9, 10, 148, 128, 1.965, 132_644_864, 228 * 2**10),
}


class Interconnect(Protocol):
  """The network between the chips of a program."""

  @property
  def chip(self) -> Chip | Gpu: ...

  @property
  def overlaps(self) -> bool:
    """Whether a chip moves the data of one operation while it computes another."""

  def seconds(self, collective: Collective) -> float:
    """The time of one collective by itself."""


def network(devices: Sequence[jax.Device]) -> Interconnect | None:
  """The network between these devices; None if their kind is unknown."""
  kind = devices[0].device_kind
  if chip := next((chip for part, chip in CHIPS.items() if part in kind), None):
    places = tuple(tuple(d.coords) for d in devices)
    return Torus(chip, tuple(max(axis) + 1 for axis in zip(*places, strict=True)), places)
  if gpu := next((gpu for gpu in GPUS.values() if gpu.name == kind), None):
    return Nodes(gpu, tuple(d.process_index for d in devices))
  return None


@dataclasses.dataclass(frozen=True)
class Nodes:
  """GPUs in nodes; `places` is the node of each device, in the order of the program."""

  chip: Gpu
  places: tuple[int, ...]
  overlaps = False

  def seconds(self, collective: Collective) -> float:
    """What each GPU sends: over NVLink within a node, else over the network cards of the group's GPUs in a node."""
    if collective.kind == 'collective-permute':
      outside = any(len({self.places[i] for i in pair}) > 1 for pair in collective.groups)
      return collective.bytes / (self.chip.nic if outside else self.chip.link)
    members = Counter(self.places[i] for i in collective.groups[0])
    rate = self.chip.link if len(members) == 1 else min(self.chip.link, self.chip.nic * min(members.values()))
    return collective.sent / rate


@dataclasses.dataclass(frozen=True)
class Torus:
  """TPU chips in a torus of `shape`; `places` is the position (x, y, z) of each device, in the order of the program."""

  chip: Chip
  shape: tuple[int, ...]
  places: tuple[tuple[int, ...], ...]
  overlaps = True

  def seconds(self, collective: Collective) -> float:
    """The time of one collective by itself: what each chip sends, over both links of every axis that its groups cover.

    Along an axis that does not close to a ring only one link counts, as the chips at the ends have no other. A
    permutation takes as long as its busiest link, where every pair is routed along one axis after the other.
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
    """The number of pairs that the busiest link serves."""
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


# --- Devices to compile for


def devices_of(topology: str) -> list[jax.Device]:
  """Returns devices to compile for. Raises ValueError if their compiler is missing or does not know the topology."""
  if not topology:
    raise ValueError(f'give --topology, for example {EXAMPLES}.')
  kind, _, shape = topology.partition(':')
  options = _gpus(GPUS[kind], shape) if kind in GPUS else _tpus(topology)
  try:
    return list(topologies.get_topology_desc(**options).devices)
  except Exception as e:  # the compilers' exceptions have no common class
    reason = ' '.join(str(e).split())[:200]
    raise ValueError(f'--topology {topology!r} is invalid ({reason}); expected for example {EXAMPLES}.') from e


def _tpus(topology: str) -> dict[str, str]:
  """The description of TPUs for JAX."""
  if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
    raise ValueError('the compiler for TPUs, libtpu, is not installed; pip install -e ".[aot]".')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no chip is claimed, so other processes may load it, too
  return dict(topology_name=topology, platform='tpu')


def _gpus(gpu: Gpu, shape: str) -> dict[str, str]:
  """The description of GPUs for JAX."""
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', shape):
    raise ValueError(f'expected a number of GPUs or nodes x GPUs per node, as in h200:8 or h200:4x8, not {shape!r}.')
  plugins = importlib.util.find_spec('jax_plugins')
  if plugins is None or not any(importlib.util.find_spec(f'jax_plugins.xla_cuda{n}') for n in (12, 13)):
    raise ValueError('the compiler for GPUs is not installed; pip install -e ".[cuda]".')
  nodes, _, each = shape.rpartition('x')
  return dict(platform='cuda', target_config=gpu.target, topology=f'1x{nodes or 1}x{each}')
