"""Runs the Triton backend's launches without a GPU, by Triton's interpreter.

It executes the kernels in numpy. TRITON_INTERPRET=1 must be set before the
kernels are first imported.
"""

import functools

import jax
import numpy as np

_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_NAMES["int32"] = "i32"


class _Buffer:
  """A numpy array with what the interpreter asks of a tensor."""

  def __init__(self, array):
    self.array, self.dtype = array, _NAMES[array.dtype.name]

  def data_ptr(self):
    return self.array.ctypes.data

  def untyped_storage(self):
    return self

  def cpu(self):
    return self

  def new_empty(self, *_, **__):
    return _Buffer(self.array)

  def set_(self, *_):
    pass

  def copy_(self, _):
    pass

  def storage_offset(self):
    return 0

  def size(self):
    return self.array.shape

  def stride(self):
    return 1


@functools.cache
def _patched_interpreter():
  """Lets loop bounds be arrays of one element, which numpy 2.4 refuses."""
  from triton.runtime import interpreter

  original = interpreter._patch_lang_tensor

  def patch(tensor, *scope):
    original(tensor, *scope)
    tensor.__index__ = lambda self: int(np.asarray(self.handle.data).item())

  interpreter._patch_lang_tensor = patch


def interpret(launch):
  """A launcher that executes the kernel on the host."""
  _patched_interpreter()
  from crcm_jax.kernels import triton_kernels

  kernel = getattr(triton_kernels, launch.kernel)

  def run(*arrays):
    inputs = [_Buffer(np.ascontiguousarray(a)) for a in arrays]
    outputs = [
      _Buffer(np.full(o.shape, np.nan, o.dtype)) for o in launch.outputs
    ]
    with np.errstate(divide="ignore"):  # log of 0: a query that sees nothing
      kernel[launch.grid](*inputs, *outputs, **launch.constants)
    return [b.array for b in outputs]

  return jax.pure_callback(run, list(launch.outputs), *launch.arrays)
