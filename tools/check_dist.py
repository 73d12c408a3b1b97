"""Builds wheel and sdist; installs each in an empty environment; uses it.

Without any extra, `crcm_jax.losses` must import neither Flax nor Optax, and
the kernels must travel with the package although they live in a linked folder.
Usage: `python tools/check_dist.py`.
"""

import pathlib
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
USE = """
import sys
import crcm_jax.losses, crcm_jax.paths, crcm_jax.sampling
assert not {"flax", "optax"} & set(sys.modules), "the maths pulled in Flax"
import crcm_jax, jax.numpy as jnp
from crcm_jax import kernels, models
q = jnp.ones((1, 6, 2, 8))
mask = kernels.BlockMask.block_causal((0, 2, 4, 6))
assert kernels.attention(q, q, q, mask=mask).shape == q.shape
from crcm_jax.kernels import block_sizes
assert (block_sizes.TABLES / "NVIDIA_H100.json").exists(), "no measured tiles"
assert "site-packages" in crcm_jax.__file__, crcm_jax.__file__
"""


def main() -> None:
  """Builds both archives and tries each."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder)
    _run(sys.executable, "-m", "build", "-o", str(out), str(ROOT))
    archives = [*out.glob("*.whl"), *out.glob("*.tar.gz")]
    assert len(archives) == 2, archives
    for archive in archives:
      _try(archive, out / archive.suffix.strip("."))
      print(f"{archive.name}: installs and runs in an empty environment")


def _try(archive: pathlib.Path, home: pathlib.Path) -> None:
  venv.create(home, with_pip=True)
  python = home / "bin" / "python"
  _run(str(python), "-m", "pip", "install", "-q", str(archive))
  _run(str(python), "-c", USE, cwd=home)
  _run(str(home / "bin" / "crcm"), "--help", cwd=home)


def _run(*command: str, cwd: pathlib.Path = ROOT) -> None:
  done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
  main()
