"""Two ways to run the Triton backend's launches without a GPU.

`interpret` executes the kernels with Triton's interpreter, in numpy;
TRITON_INTERPRET=1 must be set before triton is first imported. `Compiler`
compiles them for a GPU that is not there.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
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


@dataclasses.dataclass
class Compiler:
  """A launcher that compiles for a compute capability, such as 90.

  Attributes:
    capability: Ten times the compute capability.
    compiled: What Triton made of each launch.
  """

  capability: int
  compiled: list = dataclasses.field(default_factory=list)

  def __hash__(self):
    return id(self)

  def __call__(self, launch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from crcm_jax.kernels import triton_kernels

    kernel = getattr(triton_kernels, launch.kernel)
    arrays = [*launch.arrays, *launch.outputs]
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {
      name: "*" + _NAMES[jnp.dtype(a.dtype).name]
      for name, a in zip(names, arrays, strict=False)
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    source = ASTSource(
      kernel,
      signature | dict.fromkeys(launch.constants, "constexpr"),
      launch.constants,
      aligned,
    )
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    target = GPUTarget("cuda", self.capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    self.compiled.append((launch, compiled))
    return [jnp.zeros(o.shape, o.dtype) for o in launch.outputs]
