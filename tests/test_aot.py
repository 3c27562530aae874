"""Costs of compiled programs, the roofline, and programs compiled for the devices of this machine."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from ml_collections import ConfigDict

from configs import common, finetune_dalle_mini, finetune_mindalle, finetune_storydalle, finetune_vqgan
from dalle_jax.aot import __main__ as command
from dalle_jax.aot import costs, machines, program, roofline
from dalle_jax.aot.program import Program, Programs
from dalle_jax.layers import basic, kernels
from dalle_jax.training import checkpoint, sharding
from dalle_jax.training import config as config_lib
from dalle_jax.training.state import Context
from tests import runs

LOOPS = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = f32[4,4]{1,0} constant({...})
  %y = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[8,4]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1},{2,3}}, metadata={op_name="a"}
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %sum)
}

%inner_condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %start = (f32[8,4]{1,0}, f32[8,16]{1,0}) all-gather-start(%x), dimensions={1}, replica_groups=[1,4]<=[4]
  ROOT %loop = (s32[], /*index=1*/f32[8,4]{1,0}) while(%p), condition=%inner_condition, body=%inner
  %done = f32[8,16]{1,0} all-gather-done(%start)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %i = s32[] constant(0)
  %t = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
  %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""

FUSIONS = """HloModule fusions

%sliced (p0: f32[24,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[24,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,128]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,128}
}

%put (p0: f32[24,128], p1: f32[1,128], p2: s32[]) -> f32[24,128] {
  %p0 = f32[24,128]{1,0} parameter(0)
  %p1 = f32[1,128]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %s = f32[24,128]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

ENTRY %main (all: f32[24,128], i: s32[]) -> f32[24,128] {
  %all = f32[24,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,128]{1,0} fusion(%all, %i), kind=kLoop, calls=%sliced
  %near = f32[1,128]{1,0:T(8,128)S(1)} copy(%one)
  ROOT %out = f32[24,128]{1,0} fusion(%all, %near, %i), kind=kLoop, calls=%put
}
"""


def test_loops_count_as_often_as_they_run():
  entry, outer, inner = costs.regions(LOOPS, 4)
  assert [(r.name, r.times) for r in (entry, outer, inner)] == [('main', 1), ('outer', 3), ('inner', 15)]
  assert (entry.flops, outer.flops, inner.flops) == (0, 0, 2 * 8 * 4 * 4)
  assert not entry.each and inner.each[0] == (2 * 8 * 4 * 4, (8 * 4 + 4 * 4 + 8 * 4) * 4)
  (gather,), (reduce,) = outer.collectives, inner.collectives
  assert gather == costs.Collective('all-gather', 8 * 16 * 4, ((0, 1, 2, 3),), True)
  assert reduce == costs.Collective('all-reduce', 8 * 4 * 4, ((0, 1), (2, 3)), False)
  assert (gather.sent, reduce.sent) == (8 * 16 * 4 * 3 / 4, 2 * 8 * 4 * 4 / 2)


def test_fusions_move_the_slices_that_they_read_and_write():
  (entry,) = costs.regions(FUSIONS, 1)
  row, index = 128 * 4, 4
  # read a row and the index, write a row; copy it into the core; write it from there into its place
  assert entry.bytes == (row + index + row) + row + (index + row)


STEPS = """HloModule asynchronous

%start (p: bf16[4]) -> (bf16[4], bf16[16]) {
  %p = bf16[4]{0} parameter(0)
  %g = bf16[16]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=1,'b'=4] {'b'}
  ROOT %s = (bf16[4]{0}, bf16[16]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[4], q: bf16[16]) -> bf16[16] {
  %p = bf16[4]{0} parameter(0)
  %q = bf16[16]{0} parameter(1)
  %g = bf16[16]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=1,'b'=4] {'b'}
  ROOT %s = bf16[16]{0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

%body (p: (u32[], bf16[4])) -> (u32[], bf16[4]) {
  %p = (u32[], bf16[4]{0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %x = bf16[4]{0} get-tuple-element(%p), index=1
  %f = (bf16[4]{0}, bf16[16]{0}) fusion(%x), kind=kCustom, calls=%start
  %y = bf16[4]{0} get-tuple-element(%f), index=0
  ROOT %t = (u32[], bf16[4]{0}) tuple(%next, %y)
}

%condition (p: (u32[], bf16[4])) -> pred[] {
  %p = (u32[], bf16[4]{0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %n = u32[] constant(16)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[4]) -> bf16[16] {
  %x = bf16[4]{0} parameter(0)
  %one = u32[] constant(1)
  %t = (u32[], bf16[4]{0}) tuple(%one, %x)
  %loop = (u32[], bf16[4]{0}) while(%t), condition=%condition, body=%body
  %y = bf16[4]{0} get-tuple-element(%loop), index=1
  ROOT %d = bf16[16]{0} fusion(%y, %y), kind=kCustom, calls=%done
}
"""


def test_the_steps_of_an_asynchronous_collective_are_one_and_loops_count_by_their_step():
  entry, body = costs.regions(STEPS, 4)
  assert (body.times, entry.collectives) == (8, [])  # 1, 3, ..., 15
  assert body.collectives == [costs.Collective('all-gather', 32, ((0, 1, 2, 3),), True)]


PREFETCH = """HloModule prefetch

ENTRY %main (w: bf16[8,4]) -> bf16[2,4] {
  %w = bf16[8,4]{1,0} parameter(0)
  %s = ((bf16[8,4]{1,0}), bf16[2,4]{1,0:T(8,128)(2,1)S(1)}, s32[]) slice-start(%w), slice={[0:2], [0:4]}
  ROOT %d = bf16[2,4]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
}
"""


def test_a_slice_that_is_fetched_ahead_is_read_once():
  (entry,) = costs.regions(PREFETCH, 1)
  assert entry.bytes == 2 * 4 * 2  # into the memory of the core


@pytest.mark.parametrize(
  'attributes, groups',
  [
    ('replica_groups={{0,2},{1,3}}', ((0, 2), (1, 3))),
    ('replica_groups=[2,2]<=[4]', ((0, 1), (2, 3))),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
    ('source_target_pairs={{1,2},{2,3}}', ((1, 2), (2, 3))),
    ('replica_groups={}', ((0, 1, 2, 3),)),
  ],
)
def test_groups(attributes, groups):
  assert costs._groups(attributes, 4) == groups


@pytest.mark.parametrize(
  'left, right, out, attributes, flops',
  [
    ('8,4', '4,6', '8,6', 'dim_labels=bf_io->bf', 2 * 8 * 4 * 6),
    ('1,5,5,3', '3,3,3,7', '1,3,3,7', 'window={size=3x3}, dim_labels=b01f_01io->b01f', 2 * 9 * 9 * 3 * 7),
    ('1,3,1', '3,1,1', '1,3,1', 'window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f', 2 * 7),  # two meet padding
    # 5 products of [8, 4] and [4, 6], as the TPU's compiler writes them
    ('5,8,4', '5,4,6', '5,8,6', 'window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf', 2 * 5 * 8 * 4 * 6),
  ],
)
def test_convolutions(left, right, out, attributes, flops):
  text = f"""HloModule one

ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{right}] parameter(1)
  ROOT %c = f32[{out}] convolution(%a, %b), {attributes}
}}
"""
  assert costs.regions(text, 1)[0].flops == flops


CAUSAL = 'backend_config={"cudnn_fmha_backend_config": {"mask_type": "CAUSAL"}}'
STRIDED = 'window={size=3x3 pad=0_1x0_1 stride=2x2}, dim_labels=b01f_o01i->b01f'
TAKEN = (2 + 3) ** 2  # pairs of position and kernel of two positions along each axis of four, less what is padding


@pytest.mark.parametrize(
  'shapes, target, attributes, flops',
  [
    (['2,6,4,8'] * 4, '__cudnn$fmhaSoftmax', CAUSAL, 2 * 2 * (2 * 4 * 8) * 21),
    (['2,6,4,8'] * 4, '__cudnn$fmhaSoftmax', 'backend_config={"mask_type": "NO_MASK"}', 2 * 2 * (2 * 4 * 8) * 36),
    (['2,6,4,8'] * 4, '__cudnn$fmhaSoftmaxBackward', CAUSAL, 5 * 2 * (2 * 4 * 8) * 21),
    (['5,4,4,3', '7,3,3,3', '7', '5,2,2,7'], '__cudnn$convBiasActivationForward', STRIDED, 2 * 5 * 7 * 3 * TAKEN),
    (['5,2,2,7', '7,3,3,3', '7', '5,4,4,3'], '__cudnn$convBackwardInput', STRIDED, 2 * 5 * 7 * 3 * TAKEN),
    (['5,4,4,3', '5,2,2,7', '7', '7,3,3,3'], '__cudnn$convBackwardFilter', STRIDED, 2 * 5 * 7 * 3 * TAKEN),
    (
      ['8,4', '4,6', '6', '8,6'],
      '__cublas$gemm',
      'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
      2 * 8 * 4 * 6,
    ),
    (['8,4', '4,6', '6', '8,6'], 'AllocateBuffer', '', 0),
  ],
)
def test_kernels_of_gpus(shapes, target, attributes, flops):
  a, b, c, out = shapes
  text = f"""HloModule one

ENTRY %main (a: bf16[{a}], b: bf16[{b}], c: bf16[{c}]) -> bf16[{out}] {{
  %a = bf16[{a}] parameter(0)
  %b = bf16[{b}] parameter(1)
  %c = bf16[{c}] parameter(2)
  %k = (bf16[{out}], u8[0]) custom-call(%a, %b, %c), custom_call_target="{target}", {attributes}
  ROOT %made = bf16[{out}] get-tuple-element(%k), index=0
}}
"""
  (entry,) = costs.regions(text, 1)
  size = lambda shape: 2 * np.prod([int(n) for n in shape.split(',')])
  assert entry.flops == flops and entry.bytes == (sum(map(size, shapes)) if flops else 0)
  assert entry.each == ([(flops, entry.bytes)] if flops else [])


def test_what_is_waited_for_at_once_is_not_beside_anything():
  done = '  %done = f32[8,16]{1,0} all-gather-done(%start)\n'
  start = '  ROOT %loop = (s32[], /*index=1*/f32[8,4]{1,0}) while(%p)'
  _, outer, _ = costs.regions(LOOPS.replace(done, '').replace(start, done + start), 4)
  assert [c.hidden for c in outer.collectives] == [False]


CHAIN = """HloModule chain, is_scheduled=true

%inside (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  ROOT %all = f32[32]{0} all-gather(%x), dimensions={0}, replica_groups={}
}

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[32]{0}, u32[]) async-start(%x), calls=%inside
  %update = ((f32[8]{0}), f32[32]{0}, u32[]) async-update(%start)
  %done = f32[32]{0} async-done(%update)
  %after = f32[32]{0} negate(%done)
  ROOT %out = f32[32]{0} copy(%after)
}
"""


def test_an_asynchronous_step_ends_with_its_done():
  collective = lambda text: costs.regions(text, 4)[0].collectives[0]
  assert not collective(CHAIN).hidden
  done = '  %done = f32[32]{0} async-done(%update)\n'
  assert collective(CHAIN.replace(done, '  %other = f32[8]{0} negate(%x)\n' + done)).hidden
  (entry,) = costs.regions(CHAIN, 4)
  moved = [32 + 128, 2 * 128, 2 * 128]  # what the start itself names is what is inside of it
  assert [m for _, m in entry.each] == moved and entry.bytes == sum(moved)


def test_products_without_tiles_are_compiled_for_cublas():
  class Lowered:
    def compile(self, compiler_options=None):
      if not compiler_options:
        raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo")
      return compiler_options

  assert program._compile(Lowered()) == {'xla_gpu_enable_triton_gemm': False}


BRANCHES = """HloModule branches

%few (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%many (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %grid = s8[1,10,5]{2,1,0} constant({...})
  %q = bf16[2,4,1280,64]{3,2,1,0} constant({...})
  %splash_mha_fwd_residuals.1 = bf16[2,4,1280,64]{3,2,1,0} custom-call(%grid, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 128}"
}}
  %w = f32[8,8]{1,0} constant({...})
  %after = f32[8]{0} dot(%p, %w), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %out = f32[8]{0} bitcast(%p)
}

ENTRY %main (i: s32[], p: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %p = f32[8]{0} parameter(1)
  ROOT %out = f32[8]{0} conditional(%i, %p, %p), branch_computations={%few, %many}
}
"""  # noqa: E501


def test_the_largest_branch_counts_and_the_blocks_of_splash_attention():
  (entry,) = costs.regions(BRANCHES, 1)
  assert entry.flops == 2 * (2 * 2 * 4 * 64) * 50 * 128 * 128 + 2 * 8 * 8  # two products of 50 blocks of 128 x 128
  assert entry.bytes == 2 * (2 * 4 * 1280 * 64) * 2 + 50 + (8 + 8 * 8 + 8) * 4
  (beside,) = costs.regions(BRANCHES.replace('(0)\n}\n\n%many', '(0)\n}, execution_thread="other"\n\n%many'), 1)
  assert beside.flops == entry.flops
  (one_row,) = costs.regions(BRANCHES.replace('[2,4,1280,64]{3,2,1,0}', '[4,1280,64]{2,1,0}'), 1)
  assert one_row.flops - 128 == (entry.flops - 128) / 2


def test_a_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY'):
    costs.regions('hello', 1)


def torus(shape, ring=16):
  places = tuple((x, y, 0) for x in range(shape[0]) for y in range(shape[1]))
  return machines.Torus(machines.Chip(16, bandwidth=10.0, link=1.0, ring=ring), (*shape, 1), places)


def test_the_links_of_a_group():
  gather = lambda group: costs.Collective('all-gather', len(group) / (len(group) - 1), (tuple(group),), True)  # sends 1
  assert torus((16, 16)).seconds(gather(range(256))) == pytest.approx(1 / 4)  # two rings
  assert torus((16, 16)).seconds(gather(range(16))) == pytest.approx(1 / 2)  # one
  assert torus((16, 16)).seconds(gather(range(8))) == pytest.approx(1)  # a part of one
  assert torus((4, 4)).seconds(gather(range(16))) == pytest.approx(1 / 2)  # two lines
  assert torus((4, 4)).seconds(costs.Collective('all-gather', 8.0, ((0,),), True)) == 0


def test_the_busiest_link_of_a_permutation():
  shift = tuple((i, (i + 1) % 4) for i in range(4))
  permute = lambda pairs: costs.Collective('collective-permute', 1.0, pairs, True)
  assert torus((1, 4), ring=4).seconds(permute(shift)) == 1  # once around the ring
  assert torus((1, 4)).seconds(permute(shift)) == 1  # the last goes back over the other direction of the links
  assert torus((1, 4)).seconds(permute(((0, 2), (1, 3)))) == 2


def test_gpus_reach_their_node_by_nvlink_and_others_by_the_cards_of_the_group():
  gpu = machines.GPUS['h200']
  nodes = machines.Nodes(gpu, (0, 0, 0, 0, 1, 1, 1, 1))
  sends = lambda group: costs.Collective('all-gather', 1e9 * len(group) / (len(group) - 1), (tuple(group),), True)
  assert nodes.seconds(sends(range(4))) == pytest.approx(1e9 / gpu.link)
  assert nodes.seconds(sends(range(8))) == pytest.approx(1e9 / (4 * gpu.nic))
  assert nodes.seconds(sends((0, 4))) == pytest.approx(1e9 / gpu.nic)
  permute = lambda *pairs: costs.Collective('collective-permute', 1e9, pairs, True)
  assert nodes.seconds(permute((0, 1), (1, 0))) == pytest.approx(1e9 / gpu.link)
  assert nodes.seconds(permute((3, 4), (7, 0))) == pytest.approx(1e9 / gpu.nic)


@pytest.mark.parametrize('topology, error', [('h200:x8', "not 'x8'"), ('h200', "not ''"), ('', 'give --topology')])
def test_topologies_that_are_none(topology, error):
  with pytest.raises(ValueError, match=error):
    machines.devices_of(topology)


def test_jax_takes_a_part_of_a_gpu(monkeypatch):
  for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(name, raising=False)
  assert machines.GPUS['h200'].hbm == 3 * machines.GPUS['h200'].memory // 4
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '.9')
  assert machines.GPUS['h200'].hbm == int(0.9 * machines.GPUS['h200'].memory)


def test_what_is_hidden_and_what_is_waited_for():
  hidden = costs.Collective('all-gather', 32.0, ((0, 1, 4, 5),), True)  # 24 bytes over two links of 1 byte/s
  waiting = costs.Collective('all-reduce', 4.0, ((0, 1, 4, 5),), False)  # 6 bytes
  each = [(20.0, 10.0), (0.0, 40.0)]  # 10 s, with 1 s of memory beside; 4 s
  loop = costs.Region('loop', 10, flops=20.0, bytes=50.0, each=each, collectives=[hidden, waiting])
  main = costs.Region('main', 1, flops=4.0, each=[(4.0, 0.0)])
  e = roofline.estimate([main, loop], torus((4, 4)), peak=2.0)
  assert (e.compute, e.memory, e.network) == (2 + 100, 50, 150)
  assert e.total == 2 + 10 * (12 + 3) and e.exposed == 10 * (2 + 3)
  assert e.operations == 1 + 10 * 2
  one_by_one = types.SimpleNamespace(chip=torus((4, 4)).chip, overlaps=False, seconds=torus((4, 4)).seconds)
  e = roofline.estimate([main, loop], one_by_one, peak=2.0)
  assert e.total == 2 + 10 * (10 + 4 + 3) and e.exposed == 10 * 3


def tiny():
  c = common.base()
  c.objective, c.frozen = 'dalle', dict(vqgan='')
  c.model = dict(variant='test', d_model=32, heads=4, remat='full')
  c.tokenizer.update(vocab_size=34, length=6)
  c.data.update(image_size=8, batch_size=16)
  c.encode.enabled = True
  c.train.update(ema=0.9, accum=2)
  c.mesh.update(common.MESHES['fsdp'])
  return c


def test_a_step_and_a_sampler_for_devices_of_this_machine(capsys):
  config = tiny()
  with sharding.use(config.mesh, config.rules, jax.devices()[:4]) as mesh:
    plan = Programs(config, mesh, vqgan_variant='test', batch_per_chip=8)
    assert plan.batch['text'].shape == (32, 6) and plan.batch['tokens'].shape == (32, 16)
    step, sampler = plan.step(), plan.sampler(2)
    assert command.report(plan, step, mesh)
  state = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(plan.state))
  assert state < step.arguments < state + 8 * (6 + 16) * 4 + 1024 and not step.needs
  flops = sum(r.times * r.flops for r in step.regions) * 4
  assert 1.0 < flops / plan.objective.flops(plan.batch) < 1.6  # what the backward pass computes again
  kinds = {c.kind for r in step.regions for c in r.collectives}
  assert 'all-gather' in kinds and kinds & {'reduce-scatter', 'all-reduce'}
  assert sampler.bytes > 0 and any(r.times > 1 for r in sampler.regions)
  assert 'times the model FLOPs' in capsys.readouterr().out


def test_the_sizes_of_a_dalle_mini_without_the_run_to_start_from(tmp_path):
  sizes = {'test': (40, 6, 16, (4, 4)), 'mini': (50_264, 64, 16_384, (16, 16)), 'mega': (50_272, 64, 16_384, (16, 16))}
  for variant, expected in sizes.items():
    config = finetune_dalle_mini.get_config(f'base={tmp_path}')
    config.model.variant = variant
    if variant == 'test':
      config.data.image_size = 8
    with sharding.use(config.mesh, config.rules, jax.devices()[:1]) as mesh:
      plan = Programs(config, mesh)
      model = plan.objective.model
      assert (model.text_vocab, model.text_length, model.image_vocab, model.grid) == expected
      assert (model.pad, model.bos, model.eos) == (1, 0, 2) and plan.batch['text'].shape == (16, model.text_length)
      if variant == 'test':
        assert plan.step().bytes
  assert plan.parameters['dalle'] == pytest.approx(2.59e9, rel=1e-3)


@pytest.mark.parametrize(
  'recipe, names',
  [
    (finetune_dalle_mini, 'test, mini, mega'),
    (finetune_mindalle, r'test, .*mindalle, .*'),
    (finetune_storydalle, r'test, .*mindalle, .*'),
    (finetune_vqgan, r'test, .*f16_1024, .*'),
  ],
)
def test_a_run_to_start_from_that_is_not_there(tmp_path, recipe, names):
  config = recipe.get_config(f'base={tmp_path}')
  with sharding.use(config.mesh, config.rules, jax.devices()[:1]) as mesh:
    with pytest.raises(
      ValueError, match=f'start from, {tmp_path}, cannot be read.* --config.model.variant=NAME, one of {names}[.]$'
    ):
      Programs(config, mesh)
    if recipe not in (finetune_dalle_mini, finetune_vqgan):
      config.model.variant = 'mindalle'
      plan = Programs(config, mesh)
      model = getattr(plan.objective.model, 'dalle', plan.objective.model)
      assert model.text_vocab == 16_384 + len(config.tokenizer.new_tokens) and (model.pad, model.grid) == (0, (16, 16))


def test_the_sizes_of_the_run_to_start_from(tmp_path):
  """Its VQGAN has no encoder, like the published one, so there is only a sampler."""
  images = {'objective': 'vqgan', 'model': {'variant': 'test', 'decoder_only': True, 'num_codes': 12}}
  text = dict(vocab_size=33, length=5, pad=3, start=1, end=-1)
  known = {'objective': 'dalle_mini', 'model': {'variant': 'test', 'depth': 3, 'image_spare': 2}, 'tokenizer': text}
  for path, saved in ((tmp_path, known), (tmp_path / 'frozen' / 'vqgan', images)):
    checkpoint.export_run(path, checkpoint.Run(saved, {'x': {'x': np.zeros(1)}}, None, 3, 'elsewhere'))
  config = finetune_dalle_mini.get_config(f'base={tmp_path},size=8')
  config.tokenizer.new_tokens = ('loopy',)
  with sharding.use(config.mesh, config.rules, jax.devices()[:1]) as mesh:
    plan = Programs(config, mesh)
    model = plan.objective.model
    assert (model.text_vocab, model.text_length, model.pad, model.bos, model.eos) == (34, 5, 3, 1, -1)
    assert (model.depth, model.image_spare, model.image_vocab, model.grid) == (3, 2, 12, (4, 4))
    assert config.model.variant == 'init' and plan.sampler(1).bytes
    with pytest.raises(ValueError, match='this VQGAN has only a decoder'):
      plan.step()
    assert Programs(config, mesh, vqgan_variant='test').objective.model.image_vocab == 16


def test_a_step_beside_a_frozen_clip(capsys):
  config = tiny()
  config.objective, config.frozen, config.model = 'prior', dict(clip=''), dict(variant='test')
  config.encode.enabled, config.tokenizer.vocab_size = False, 0
  with sharding.use(config.mesh, config.rules, jax.devices()[:4]) as mesh:
    plan = Programs(config, mesh, clip_variant='test', batch_per_chip=8)
    assert plan.batch['clip_text'].shape == (32, 8) and set(plan.frozen) == {'clip'}
    assert command.report(plan, plan.step(), mesh)
  assert 'FLOPs per chip' in capsys.readouterr().out


@pytest.mark.parametrize(
  'recipe, fields, extra',
  [
    ('story_flintstones.py:variant=test', {}, {'vectors': (24, 4, 512)}),
    ('characters.py', dict(variant='test'), {'labels': (24, 9)}),
    ('storyganc_pororo.py:captions=own', dict(variant='test', start=4), {'labels': (24, 5, 9)}),
    ('unclip_shapes.py:unclip', runs.UNET, {}),  # has a prior and upsamplers for sampling
  ],
)
def test_batches_have_what_the_data_of_the_recipes_has(recipe, fields, extra):
  config = config_lib.parse(['aot', f'--config=configs/{recipe}', '--config.data.image_size=16'])
  config.model.update(fields)
  config.mesh.update(data=1, fsdp=1, tensor=1, sequence=1)
  with sharding.use(config.mesh, config.rules, jax.devices()[:1]) as mesh:
    plan = Programs(config, mesh, vqgan_variant='test', clip_variant='test', batch_per_chip=24)
    assert {k: x.shape for k, x in plan.batch.items() if k in ('labels', 'vectors')} == extra
    context = Context(plan.frozen, plan.state.mutable, jax.random.key(0), jnp.int32(0), train=True)
    loss, _ = jax.eval_shape(plan.objective.loss, plan.state.params, context, plan.batch)
  assert loss.shape == ()


def test_nothing_is_said_of_sizes_where_the_mesh_splits_no_parameters(monkeypatch, capsys):
  monkeypatch.setattr(Programs, 'step', lambda plan: None)
  monkeypatch.setattr(command, 'report', lambda *_: True)
  config = tiny()
  config.mesh.update(common.MESHES['data'])
  assert command.check(config, jax.devices()[:4], vqgan='test', batch_per_chip=8, programs=['step'])
  assert 'every chip holds 100% of them whole: the mesh does not split these\n' in capsys.readouterr().out


def test_what_does_not_fit_ends_with_status_1(monkeypatch, capsys):
  chip = machines.Chip(10**9, bandwidth=1e12, link=1e11, ring=16)
  monkeypatch.setattr(machines, 'network', lambda _: dataclasses.replace(torus((2, 4)), chip=chip))
  monkeypatch.setattr(command.metrics, 'peak_flops', lambda _: 1e12)
  with sharding.use(dict(data=-1), ()) as mesh:
    for compiled, said in (
      (Program('sampler', 1.0, arguments=9 * 10**8), '0.90 GB: arguments 0.90, other 0.00; 90% of 1.0 GB, fits'),
      (Program('sampler', 1.0, arguments=9 * 10**8, code=2 * 10**8), '110% of 1.0 GB, DOES NOT FIT'),
      (Program('sampler', 1.0, needs='20G of 16G'), 'does not fit: it needs 20G of 16G of memory per chip'),
    ):
      fits = command.report(None, compiled, mesh)
      assert fits == ('not' not in said.lower()) and said in capsys.readouterr().out
      monkeypatch.setattr(machines, 'devices_of', lambda _: [])
      monkeypatch.setattr(command, 'check', lambda *_, fits=fits, **__: fits)
      assert command.main(['aot', '--config=configs/dalle_paper.py:1.3b']) == (0 if fits else 1)


def test_plans_that_cannot_be_made():
  config = tiny()
  with sharding.use(config.mesh, config.rules) as mesh:
    with pytest.raises(ValueError, match='batch_size 8 is not divisible by 8'):
      Programs(config, mesh, vqgan_variant='test', batch_per_chip=1)
    with pytest.raises(ValueError, match='only for the objectives dalle and dalle_mini, not for vqgan'):
      command.check(ConfigDict(dict(objective='vqgan')), [], vqgan='test', programs=['sampler'])
    config.frozen.roberta = ''
    with pytest.raises(ValueError, match='frozen has roberta; only a VQGAN and a CLIP can be replaced'):
      Programs(config, mesh, vqgan_variant='test')


@pytest.mark.parametrize(
  'arguments, error',
  [
    (['--config=configs/quickstart.py'], 'choose one with --config FILE.py:STAGE'),
    (['--config=configs/dalle_paper.py:1.3b'], 'libtpu, is not installed|give --topology'),
  ],
)
def test_a_mistake_is_one_line(arguments, error, capsys):
  assert command.main(['aot', *arguments]) == 2
  line = capsys.readouterr().err
  assert line.count('\n') == 1 and re.search(error, line)


def test_ctrl_c_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(machines, 'devices_of', lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
  assert command.main(['aot', '--config=configs/dalle_paper.py:1.3b']) == 143
  assert capsys.readouterr().err == 'stopped.\n'


def test_the_attention_of_gpus_that_are_not_here():
  there = lambda kind, platform: AbstractMesh((1,), ('data',), abstract_device=AbstractDevice(kind, None, platform))
  with jax.sharding.use_abstract_mesh(there('NVIDIA H200', 'gpu')):
    assert kernels.capability() == 9 and basic.platform() == 'gpu'
  with jax.sharding.use_abstract_mesh(there('NVIDIA A100 80GB', 'gpu')):
    assert kernels.capability() == 8
  with jax.sharding.use_abstract_mesh(there('TPU v5 lite', 'tpu')):
    assert kernels.capability() == 0
  assert kernels.capability() == 0  # here


def test_layers_are_compiled_for_the_mesh_in_use():
  with sharding.use(dict(data=-1), ()):
    assert basic.platform() == jax.devices()[0].platform
  assert basic.platform() == jax.default_backend()
