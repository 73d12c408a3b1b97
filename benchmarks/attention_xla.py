"""Attention in plain JAX against a dense masked softmax: time and memory.

    JAX_PLATFORMS=cpu python benchmarks/attention_xla.py

8,192 packed tokens under a teacher-forcing mask, 2 heads of 64, float32. The
limit of memory saved is the share of the mask that is visible; time is bounded
by the same share of the dense products.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from crcm_jax import kernels

TOKENS, FRAMES, HEADS, WIDTH = 8192, 16, 2, 64


def main():
  """Prints a row a mode and implementation."""
  half = TOKENS // 2
  mask = kernels.BlockMask.teacher_forcing(
    tuple(range(0, half + 1, half // FRAMES))
  )
  visible = jnp.asarray(mask.dense())
  print(
    f"{jax.devices()[0].device_kind}, JAX {jax.__version__}; visible: ", end=""
  )
  print(f"{visible.mean():.1%} of {TOKENS}^2 pairs")
  x = jax.random.normal(jax.random.key(0), (3, 1, TOKENS, HEADS, WIDTH))

  def dense(q, k, v):
    s = jnp.einsum("bsnd,bznd->bnsz", q, k) * WIDTH**-0.5
    p = jax.nn.softmax(jnp.where(visible, s, -1e30))
    return jnp.einsum("bnsz,bznd->bsnd", p, v)

  def chunked(q, k, v):
    return kernels.attention(q, k, v, mask=mask, implementation="xla")

  modes = {
    "forward": lambda f: f,
    "output and tangent": lambda f: lambda *x: jax.jvp(f, x, x[::-1]),
    "gradient": lambda f: jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2)),
  }
  for mode, derive in modes.items():
    for name, attend in (("dense", dense), ("xla", chunked)):
      run = jax.jit(derive(attend)).lower(*x).compile()
      jax.block_until_ready(run(*x))
      took = []
      for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(*x))
        took.append(time.perf_counter() - start)
      memory = run.memory_analysis().temp_size_in_bytes / 2**20
      print(
        f"{mode:18} {name:5} {1e3 * statistics.median(took):8.0f} ms "
        f"{memory:7.1f} MiB of temporary memory",
        flush=True,
      )


if __name__ == "__main__":
  main()
