#!/usr/bin/env bash
# Runs the derivative matrix, one golden case a loss, and what GPUs are asked for
# on the newest JAX.
# It needs a newer Python than the oldest that we support; where there is none,
# it says so loudly and passes.
set -euo pipefail
cd "$(dirname "$0")/.."
# The PATH may hold only pyenv's stand-in for a version that it is not set to.
if ! "${NEWEST_PYTHON:-python3.12}" -V >/dev/null 2>&1 && command -v pyenv >/dev/null
then
  NEWEST_PYTHON=$(ls -d "$(pyenv root)"/versions/3.12*/bin/python3.12 2>/dev/null | tail -n 1)
fi
if [ -z "${NEWEST_PYTHON:-}" ] || ! "$NEWEST_PYTHON" -V >/dev/null 2>&1; then
  echo "########################################################" >&2
  echo "## NOT RUN: the newest JAX needs python3.12, not found ##" >&2
  echo "########################################################" >&2
  exit 0
fi
home=.cache/newest
if [ ! -e "$home/done" ] || [ setup.cfg -nt "$home/done" ]; then
  "$NEWEST_PYTHON" -m venv "$home"
  "$home/bin/python" -m pip install -q -e '.[dev]'
  touch "$home/done"
fi
"$home/bin/python" -c 'import jax; print("newest JAX:", jax.__version__)'
"$home/bin/python" -m pytest -q -n 2 \
  tests/kernels/test_derivatives.py tests/losses/test_tangents.py \
  tests/losses/test_golden_losses.py tests/models/test_layers.py \
  tests/training/test_step.py
# Older JAX has not what GPUs are asked for in this case (`_compat.row_major`).
"$home/bin/python" -m pytest -q -m slow -k apart \
  tests/training/test_parallel_steps.py
