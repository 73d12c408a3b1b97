#!/usr/bin/env bash
# Runs the derivative matrix and one golden case a loss on the newest JAX.
# It needs a newer Python than the oldest that we support; where there is none,
# it says so loudly and passes.
set -euo pipefail
cd "$(dirname "$0")/.."
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
  tests/kernels/test_derivatives.py tests/losses/test_golden_losses.py
