"""Programs that need eight devices, run in a process of their own."""

import json
import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def run(program, *arguments, timeout=1800):
  """Runs `tests/PROGRAM.py`; returns the JSON lines that it prints."""
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
  }
  done = subprocess.run(
    [sys.executable, str(TESTS / f"{program}.py"), *arguments],
    env=environment,
    timeout=timeout,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


def start():
  """Sets JAX up inside such a program."""
  import jax

  cache = TESTS.parent / ".cache" / "jax"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def mesh(text):
  """Returns the mesh that `text` names: data x fsdp x context x tensor."""
  from crcm_jax.training import sharding

  sizes = map(int, text.split("x"))
  return sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))


def say(**values):
  """Prints a line of JSON."""
  print(json.dumps(values), flush=True)
