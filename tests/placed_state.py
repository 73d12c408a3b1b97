"""Builds a stage's first state over eight devices, and looks where it lies."""

import contextlib
import pathlib
import sys
from unittest import mock

import eight_devices
import jax
import numpy as np
import tiny

from crcm_jax import models
from crcm_jax.training import _networks, _stages, Checkpoints, sharding

NETWORK = dict(layers=2, width=16, heads=2, ffn_width=32, dtype="bfloat16")
RULES = sharding.WAN_RULES


def stage(init):
  """Returns a stage with a critic and a teacher that it reads in bfloat16."""
  section = tiny.SELF_FORCING | dict(init=init)
  return tiny.stage(**section, network=NETWORK, working_copy=True)


def sources(folder):
  """Writes a file and a workdir of random parameters, from NumPy arrays."""
  made = stage(dict(real="file"))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: rng.normal(size=a.shape).astype(a.dtype),
    _networks.param_shapes(made.model),
  )
  models.save_params(folder / "real.safetensors", params, {})
  checkpoints = Checkpoints(folder / "before")
  about = made.config | dict(pattern=None)
  checkpoints.save(1, {"student": params, "ema": params}, {}, about)
  checkpoints.close()
  return str(folder / "real.safetensors"), str(folder / "before")


class Watch:
  """Counts how often it looked, and what it saw whole on a device.

  It looks for the shapes that the rules split, and no other array has.
  """

  def __init__(self, shardings, shapes):
    leaves = zip(
      jax.tree.leaves(shardings), jax.tree.leaves(shapes), strict=True
    )
    halves = {True: set(), False: set()}
    for where, leaf in leaves:
      halves[where.is_fully_replicated].add(leaf.shape)
    self.split = halves[False] - halves[True]
    self.looked, self.whole = 0, []

  def look(self):
    self.looked += 1
    self.whole += [
      a.shape
      for a in jax.live_arrays()
      if a.shape in self.split
      and any(s.data.size == a.size for s in a.addressable_shards)
    ]

  @contextlib.contextmanager
  def during(self):
    """Has it look each time that something is read, placed or built."""
    with contextlib.ExitStack() as stack:
      for module, name in (
        (_networks, "adopt"),
        (sharding, "place"),
        (_stages, "init_state"),  # traced while its arguments are there
      ):
        watched = self._watched(getattr(module, name))
        stack.enter_context(mock.patch.object(module, name, watched))
      yield
    self.look()

  def _watched(self, function):
    def watched(*args, **settings):
      result = function(*args, **settings)
      self.look()
      return result

    return watched


def bits(tree):
  return [
    (str(a.dtype), np.asarray(a).tobytes()) for a in jax.tree.leaves(tree)
  ]


def main(folder):
  folder = pathlib.Path(folder)
  real, before = sources(folder)
  mesh = eight_devices.mesh("1x4x1x2")
  for case, init in (
    ("drawn", dict(real=real)),
    ("loaded", dict(real=real, student=before)),
  ):
    made = stage(init)
    shapes = made.state_shapes(), made.frozen_shapes()
    where = tuple(sharding.shard(tree, mesh, RULES) for tree in shapes)
    watch = Watch(where, shapes)
    with watch.during():
      state = made.init_state(folder, where[0])
    with watch.during():
      frozen = made.load_frozen(folder, where[1])
    looked, whole = watch.looked, list(watch.whole)
    found = jax.tree.map(lambda a: a.sharding, (state, frozen))
    got = bits((state, frozen))
    alone = made.init_state(folder), made.load_frozen(folder)
    watch.look()
    pointers = [
      shard.data.unsafe_buffer_pointer()
      for a in jax.tree.leaves((state, frozen))
      for shard in a.addressable_shards
    ]
    eight_devices.say(
      case=case,
      split=len(watch.split),
      looked=looked,
      whole=whole,
      whole_alone=len(watch.whole) - len(whole),
      placed=found == where,
      same=got == bits(alone),
      shared=len(pointers) - len(set(pointers)),
      narrow=str(frozen["real"]["blocks"]["ffn"]["up"]["kernel"].dtype),
    )
    del state, frozen, alone


if __name__ == "__main__":
  eight_devices.start()
  main(*sys.argv[1:])
