"""Compiles the sampling of Wan 2.1 1.3B for an H100 that is not there.

    python tools/compile_sampling.py [--pattern 3,3]

It needs `pip install 'jax[cuda13]' jax-triton`, and no GPU. A row says what a
program of `crcm sample` at 832 x 480 and 81 frames takes: seconds to compile
(without trying which algorithms are fast), GiB of arguments, of results that
are written in place of arguments, of temporaries, the largest copy in MiB (a
cache that is copied shows here), and how many convolutions cuDNN gets, of how
many spatial axes and in which layout.
"""

import argparse
import collections
import os
import re
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crcm_jax import generation, models
from crcm_jax.chunks import ChunkPattern
from crcm_jax.commands import _wan
from crcm_jax.generation import decode_to_bytes
from crcm_jax.sampling import Step

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 12 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  device_memory_size: 84942979072
}
"""
"""The GPU, as XLA is told of it."""

_COLUMNS = ("compile s", "arguments", "in place", "temporary", "copy MiB")


def main() -> None:
  """Compiles and prints."""
  parser = argparse.ArgumentParser(description="Compiles for an H100.")
  parser.add_argument(
    "--pattern", type=_wan.pattern, default=ChunkPattern(1, 1)
  )
  pattern = parser.parse_args().pattern
  topology = topologies.get_topology_desc(
    "1x1x1", platform="cuda", target_config=H100, topology="1x1x1"
  )
  _pretend_capability()
  mesh = Mesh(np.array(topology.devices), ("gpu",))
  print(f"{'program':<22}" + "".join(f"{name:>11}" for name in _COLUMNS))
  with jax.set_mesh(mesh):
    for name, lowered in _programs(pattern, mesh).items():
      print(f"{name:<22}" + _row(lowered), flush=True)


def _pretend_capability() -> None:
  """Answers what jax-triton asks a driver for."""
  from jaxlib import gpu_triton

  gpu_triton.get_compute_capability = lambda device: 90


def _programs(pattern: ChunkPattern, mesh: Mesh) -> dict[str, Any]:
  """Lowers the calls of a clip, of shapes alone."""
  on = NamedSharding(mesh, PartitionSpec())
  place = lambda tree: jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), tree
  )
  array = lambda *shape, dtype=jnp.float32: place(
    jax.ShapeDtypeStruct(shape, dtype)
  )
  networks = _networks(place)
  settings = generation.Settings(pattern=pattern)
  generator = generation.Generator(networks, settings)
  stream, shape = generator.stream, generator.shape
  config = networks.transformer.config
  text = (array(1, config.text_length, config.text_width), None)
  network = (networks.params, text)
  cache = place(
    jax.eval_shape(lambda *a: stream.init(*a, 1, shape[0]), *network)
  )
  x, noise = array(1, pattern.rest, *shape[1:]), array(4, 1, *shape)
  index, number = array(dtype=jnp.int32), array()
  at = Step(index, index, number, number)
  vae, latent = networks.vae, array(1, 1, *shape[1:])
  past = jax.eval_shape(
    lambda p, z: decode_to_bytes(vae, p, z, None)[1],
    networks.vae_params,
    latent,
  )
  decode = lambda past: decode_to_bytes.lower(
    vae, networks.vae_params, latent, past
  )
  return {
    "a step": stream.step.lower(stream, *network, cache, x, noise, at),
    "a commit": stream.commit.lower(stream, *network, cache, x, number),
    "decoding the first": decode(None),
    "decoding a later one": decode(place(past)),
  }


def _networks(place: Any) -> generation.Networks:
  """Returns the networks of 1.3B, with shapes in place of parameters."""
  config, vae_config = generation.RANDOM["1.3B"]
  model, vae = models.Wan(config), models.Vae(vae_config)

  def init() -> Any:
    key = jax.random.key(0)
    x = jnp.zeros((1, *config.patch, config.in_channels))
    text = jnp.zeros((1, config.text_length, config.text_width))
    params = model.init(key, x, jnp.zeros((1, 1)), text)["params"]
    vae_params = vae.init(key, jnp.zeros((1, 5, 16, 16, 3)))["params"]
    return jax.tree.map(lambda a: a.astype(config.dtype), (params, vae_params))

  params, vae_params = place(jax.eval_shape(init))
  return generation.Networks(
    transformer=model,
    params=params,
    vae=vae,
    vae_params=vae_params,
    embed=lambda prompts: np.zeros(()),
    about={},
    weights_hash="",
  )


def _row(lowered: Any) -> str:
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory, text = compiled.memory_analysis(), compiled.as_text()
  sizes = [
    getattr(memory, f"{name}_size_in_bytes") / 2**30
    for name in ("argument", "alias", "temp")
  ]
  copies = re.findall(r"= (\w+)\[([\d,]+)\]\S* copy\(", text)
  largest = max((_bytes(*copy) for copy in copies), default=0) / 2**20
  layouts = re.findall(r"dim_labels=(\w+->\w+|\S+?),", text)
  convolutions = collections.Counter(layouts)
  shown = ", ".join(f"{n} {layout}" for layout, n in convolutions.items())
  figures = [seconds, *sizes, largest]
  return "".join(f"{figure:>11.2f}" for figure in figures) + f"  {shown}"


def _bytes(dtype: str, shape: str) -> int:
  bits = int(re.sub(r"\D", "", dtype) or 8)
  return int(np.prod([int(n) for n in shape.split(",")])) * bits // 8


if __name__ == "__main__":
  main()
