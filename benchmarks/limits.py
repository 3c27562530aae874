"""Measured limits of a device: FLOP/s of a large matrix product, bytes/s of memory.

python -m benchmarks.limits
"""

import time

import jax
import jax.numpy as jnp


def seconds(function, *args, repeats: int = 5) -> float:
  """The time of the fastest of `repeats` calls, after one that compiles."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return min(times)


def matmul() -> float:
  """FLOP/s of a product of random square matrices: 8,192 in bfloat16, or 2,048 in float32 on a CPU."""
  n, dtype, chain = (2048, jnp.float32, 2) if jax.default_backend() == 'cpu' else (8192, jnp.bfloat16, 8)
  a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)

  @jax.jit
  def products(a, b):
    for _ in range(chain):
      a = (a @ b) * (n**-0.5)  # keeps the scale of the numbers
    return a

  return chain * 2 * n**3 / seconds(products, a, b)


def bandwidth() -> float:
  """Bytes read from memory per second, from the sum of an array of one GiB."""
  x = jax.random.normal(jax.random.key(0), (2**28,), jnp.float32)
  return x.nbytes / seconds(jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)), x)


def main() -> None:
  device = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  print(f'{device}: {matmul() / 1e12:.3f} TFLOP/s, {bandwidth() / 1e9:.1f} GB/s')


if __name__ == '__main__':
  main()
