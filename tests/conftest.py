"""Before jax is imported: eight CPU devices, compiled programs kept between runs, absl flags marked as parsed."""

import gc
import os
import resource
import sys
from importlib.metadata import version
from pathlib import Path

# Tests compile far more than they compute, so what they do is compiled quickly and runs slowly.
# From jaxlib 0.11 on there are fusion emitters alone, and XLA aborts at the flag.
os.environ['XLA_FLAGS'] = (
  f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
  ' --xla_cpu_parallel_codegen_split_count=1'
  f'{" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""}'
)
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(Path(__file__).parents[1] / '.pytest_cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')  # to write many small ones takes long

import jax
import pytest
from absl import flags

if not flags.FLAGS.is_parsed():
  flags.FLAGS(sys.argv[:1])


MEMORY = 3 * 2**20  # KiB
# A tenth of the time goes into looking for garbage among the many small objects of traces that are still in use.
gc.freeze()
gc.set_threshold(200_000, 20, 50)


@pytest.fixture(autouse=True, scope='module')
def forget():
  """Most programs of one file are of no use to the next, and all of them were gigabytes in the end."""
  yield
  if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MEMORY:  # the most there was: from then on always
    jax.clear_caches()


def pytest_collection_modifyitems(items):
  """Files of long tests first, so that workers end together."""
  long = ('training', 'pipelines', 'objectives', 'convert', 'tests')
  items.sort(key=lambda item: long.index(item.path.parent.name) if item.path.parent.name in long else len(long))


def pytest_addoption(parser):
  parser.addoption(
    '--parity-dir', default='', help='a folder of other parity folders, for tests/convert/test_parity.py'
  )
  parser.addoption('--all-meshes', action='store_true', help='tests/objectives/test_sharded.py over every mesh')
