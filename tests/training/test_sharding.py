import types
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs import common
from dalle_jax.training import metrics, sharding

RULES = common.RULES


@pytest.mark.parametrize(
  'names, shape, expected',
  [
    (('embed', 'mlp'), (8, 16), P('fsdp', 'tensor')),
    (('embed', 'heads', 'head_dim'), (8, 3, 4), P('fsdp', None, None)),  # 3 heads do not divide by 2
    (('layers', 'embed', 'mlp'), (3, 8, 16), P(None, 'fsdp', 'tensor')),
    (('vocab', 'embed'), (7, 7), P(None, None)),
    (('batch', 'seq', 'embed'), (4, 3, 8), P(('data', 'fsdp'), 'sequence', None)),  # fsdp is taken by the batch
    (('mlp', 'mlp'), (4, 4), P('tensor', None)),
    ((None, None, 'conv_in', 'conv_out'), (3, 3, 4, 4), P(None, None, 'fsdp', 'tensor')),
  ],
)
def test_partition(names, shape, expected):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  assert sharding.partition(names, shape, mesh, RULES) == expected


def test_later_rule_is_tried_when_the_first_does_not_divide():
  mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=4))
  assert sharding.partition(('heads',), (6,), mesh, (('heads', 'tensor'), ('heads', 'fsdp'))) == P('fsdp')


@pytest.mark.parametrize(
  'sizes', [dict(data=3, fsdp=1, tensor=1), dict(data=-1, fsdp=3, tensor=1), dict(data=-1, fsdp=-1)]
)
def test_mesh_that_does_not_fit_is_one_line(sizes):
  with pytest.raises(ValueError, match=r'^mesh \(data=') as e:
    sharding.make_mesh(sizes)
  assert '\n' not in str(e.value)


def test_rules_with_an_unknown_mesh_axis():
  with (
    pytest.raises(ValueError, match=r"rules name mesh axes \['model'\]"),
    sharding.use(dict(data=-1), [('mlp', 'model')]),
  ):
    pass


def test_boxes_and_constraints():
  box = nn.LogicallyPartitioned(jnp.ones((8, 16)), ('embed', 'mlp'))
  tree = {'a': {'kernel': box}, 'b': jnp.ones(3)}
  assert sharding.logical_axes(tree) == {'a/kernel': ['embed', 'mlp']}
  assert sharding.unbox(tree)['a']['kernel'] is box.value
  with sharding.use(dict(data=2, fsdp=2, tensor=2), RULES):
    constrained = jax.jit(lambda x: nn.with_logical_constraint(x, ('batch', 'mlp')))(jnp.ones((8, 4)))
    assert constrained.sharding.spec == P(('data', 'fsdp'), 'tensor')
    assert jax.jit(lambda x: nn.with_logical_constraint(x, ('batch', 'mlp')))(jnp.ones((3, 5))).shape == (3, 5)


def test_equal_networks_share_a_program_and_other_rules_have_their_own():
  seen, mesh = [], sharding.make_mesh(dict(data=2), jax.devices()[:2])

  def double(network, x):
    seen.append((network.features, nn.get_logical_axis_rules()))
    return 2 * nn.with_logical_constraint(x, ('batch', None))

  for features, rules in ((3, RULES), (4, RULES), (3, [('batch', None)]), (3, RULES), (3, list(RULES))):
    double_rows = sharding.program(double, nn.Dense(features), mesh=mesh, rules=rules)
    with sharding.within(mesh, [('batch', 'tensor')]):  # its own rules hold
      found = double_rows(jnp.ones((4, 2)))
    assert found.sharding.is_fully_replicated and (found == 2).all()
  assert seen == [(n, sharding.logical_rules(r)) for n, r in ((3, RULES), (4, RULES), (3, [('batch', None)]))]
  # Rules mean nothing without a mesh, and a static argument is part of the program.
  power = sharding.program(lambda network, x, n: x**n, nn.Dense(3), rules=RULES, static=('n',))
  assert [float(power(jnp.float32(2), n=n)) for n in (2, 3, 2)] == [4, 8, 4] and power._cache_size() == 2
  assert sharding.program(double, nn.Dense(3), rules=RULES) is sharding.program(double, nn.Dense(3))


def test_peak_flops_by_device_kind():
  class Device:
    def __init__(self, kind):
      self.device_kind = kind

  assert metrics.peak_flops(Device('NVIDIA H200')) == metrics.peak_flops(Device('NVIDIA H100 80GB HBM3')) == 989e12
  assert metrics.peak_flops(Device('TPU v5 lite')) == 197e12 and metrics.peak_flops(Device('TPU v4')) == 275e12
  for other in ('cpu', 'NVIDIA RTX A1000', 'NVIDIA RTX A4000', 'NVIDIA T400'):
    assert metrics.peak_flops(Device(other)) is None
  for kind, flops in {
    'NVIDIA L40': 181e12,
    'NVIDIA L4': 121e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'TPU v5p': 459e12,
    'TPU v3': 61.5e12,  # a chip has 123 and is two devices
  }.items():
    assert metrics.peak_flops(Device(kind)) == flops


@pytest.mark.parametrize(
  ('rows', 'expected'),  # which of the four parts of a batch each process holds
  [
    ([(0, 1), (2, 3)], [(0, 2), (1, 2)]),
    ([(0, 1, 2, 3)], [(0, 1)]),
    ([(0, 1), (2, 3), (0, 1), (2, 3)], [(0, 2), (1, 2), (0, 2), (1, 2)]),  # a tensor axis across processes
    ([(2, 3), (0, 1)], [(1, 2), (0, 2)]),
    ([(0, 2), (1, 3)], [(0, 2), (1, 2)]),  # interleaved, as hosts of a torus may be
  ],
)
def test_processes_that_hold_the_same_rows_read_the_same_part(monkeypatch, rows, expected):
  fake_processes(monkeypatch, rows)
  for process, part in enumerate(expected):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    assert sharding.part_to_read(sharding.make_mesh(dict(fsdp=4, tensor=2))) == part


def test_processes_that_hold_some_rows_both_are_refused(monkeypatch):
  fake_processes(monkeypatch, [(0, 1), (1, 2), (2, 3)])
  with pytest.raises(ValueError, match='gives some processes a part of the rows of others; choose tensor and sequence'):
    sharding.part_to_read(sharding.make_mesh(dict(fsdp=4, tensor=2)))


def fake_processes(monkeypatch, rows):
  """Process p has a device for each of rows[p], the parts of a batch in four."""
  devices = {Device(p, part): (slice(part, part + 1),) for p, parts in enumerate(rows) for part in parts}
  where = types.SimpleNamespace(devices_indices_map=lambda shape: devices)
  monkeypatch.setattr(sharding, 'batch_sharding', lambda mesh: where)


class Device(NamedTuple):
  process_index: int
  part: int
