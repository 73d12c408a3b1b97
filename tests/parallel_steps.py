"""One train step over eight devices and on one: a program of `eight_devices`.

`python parallel_steps.py STAGE MESH...` prints, for each mesh and phase, how
far loss and gradients are from those of one device, relatively, and how many
collectives of each kind the compiled step has.
"""

import collections
import dataclasses
import re
import sys

import eight_devices
import jax
import jax.numpy as jnp
import optax

from crcm_jax.kernels import _compat
from crcm_jax.training import _networks, read_stage, sharding, step_arguments
from crcm_jax.training.objectives import _self_forcing

TEACHER = dict(init=dict(student="teacher", teacher="teacher"))
BY_COLUMNS = ((".*blocks/.*/kernel", (None, None, "fsdp")), (".*", ()))
CRITIC = dict(critic={}, critic_optimizer=dict(learning_rate=0.1))
STAGES = {
  "bidirectional_diffusion": {},
  "teacher_forcing": {},
  "diffusion_forcing": {},
  "discrete_consistency": TEACHER,
  "continuous_consistency": TEACHER,
  "mean_flow": TEACHER | dict(network=dict(end_time=True)),
  "ode_regression": TEACHER,
  "bidirectional_ode_regression": dict(init=dict(real="real")),
  "self_forcing": CRITIC | dict(init=dict(real="real")),
  "joint": CRITIC | dict(init=dict(teacher="teacher", real="real")),
  # And what a stage may change, after its name.
  "self_forcing, lean rollouts": CRITIC
  | dict(init=dict(real="real"), loop=dict(lean_rollouts=True)),
  "self_forcing, layers apart": CRITIC | dict(init=dict(real="real")),
  "teacher_forcing, micro-batches": dict(loop=dict(micro_batches=2)),
  "discrete_consistency, rules of its own": TEACHER
  | dict(sharding=dict(student="replicated", teacher=BY_COLUMNS)),
}
PARTS = ("continuous_consistency", "self_forcing")
HEADS = 12
"""Over 4 x 2 devices (context x tensor) they are swapped between two
neighbours, and their keys gathered by two pairs."""

RECORD = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, *_: (jax.tree.map(jnp.zeros_like, grads), grads),
)
"""An optimizer that keeps the gradient as its state, and updates nothing."""


def config(name):
  """Returns a tiny stage."""
  objective = dict(name=name.split(",")[0])
  if name == "joint":
    objective |= dict(parts=PARTS, **{part: {} for part in PARTS})
  more = STAGES[name]
  network = dict(layers=2, width=96, heads=HEADS, ffn_width=64, freq_width=8)
  sizes = dict(text_width=8, text_length=4)
  channels = dict(in_channels=4, out_channels=4)
  video = dict(batch_size=8, frames=3, height=4, width=8, channels=4)
  return dict(
    seed=0,
    steps=1,
    objective=objective,
    optimizer=dict(learning_rate=0.1),
    pattern=dict(first=1, rest=2),
    data=dict(name="random_latents", **video, **sizes),
    sampling=dict(mid_times={"2": ((5 / 6,),)}, ode_steps=4),
    **{key: value for key, value in more.items() if key != "network"},
    network=network | sizes | channels | more.get("network", {}),
  )


def recording(stage):
  """Returns the stage with optimizers that keep gradients."""
  return dataclasses.replace(
    stage, optimizers=dict.fromkeys(stage.optimizers, RECORD)
  )


def params(stage, role):
  """Draws a role's parameters, none of them zero."""
  first = _networks.init_params(stage.model, jax.random.key(0))
  leaves, tree = jax.tree.flatten(first)
  keys = jax.random.split(jax.random.key(sum(map(ord, role))), len(leaves))
  pairs = zip(leaves, keys, strict=True)
  return tree.unflatten(
    a + 0.1 * jax.random.normal(key, a.shape) for a, key in pairs
  )


def steps(stage, mesh):
  """Yields each phase with its loss, its gradients and its program's text."""
  stage = recording(stage.on(mesh))
  where = step_arguments(stage, mesh).shardings()
  frozen = {role: params(stage, role) for role in stage.kind.frozen}
  frozen = jax.device_put(frozen, where.frozen)
  batch = sharding.place_batch(next(stage.dataset.batches(None, 0)), mesh)
  for phase, step in stage.train_steps(where).items():
    fake = params(stage, "fake") if stage.kind.critic else None
    state = stage._state(params(stage, "student"), fake)
    args = (jax.device_put(state, where.state), frozen, batch)
    args = (*args, stage.run_key())
    program = step.lower(*args).compile()
    state, metrics = program(*args)
    check(state, where.state, args[0])
    grads = dict(student=state.student_opt_state, critic=state.fake_opt_state)
    loss = float(metrics["loss"])
    yield phase, loss, jax.device_get(grads[phase]), program.as_text()


def check(state, shardings, old):
  """Checks that a step was taken, kept its shardings, and used the donation."""
  assert int(state.skipped) == 0
  for a, where in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
    assert a.sharding.is_equivalent_to(where, a.ndim)
  assert all(a.is_deleted() for a in jax.tree.leaves(old.student))


def collectives(text):
  """Counts a program's collectives among more than one device, by kind."""
  kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-\\w+"
  counts = collections.Counter()
  for line in text.splitlines():
    found = re.search(rf" ({kinds})(-start)?\(", line)
    if found and "replica_groups={{0},{1}," not in line:
      counts[found[1]] += 1
  return dict(sorted(counts.items()))


def main(name, *meshes):
  """Compares the stage's steps on every mesh."""
  eight_devices.start()
  if name.endswith("layers apart"):
    _self_forcing.target_platform = _compat.target_platform = lambda: "gpu"
  stage = read_stage(name, config(name))
  single = {phase: rest for phase, *rest in steps(stage, one_device())}
  distance = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
  for text in meshes:
    mesh = eight_devices.mesh(text)
    for phase, loss, grads, program in steps(stage, mesh):
      want_loss, want_grads, _ = single[phase]
      far = jax.tree.map(distance, grads, want_grads)
      eight_devices.say(
        stage=name,
        phase=phase,
        mesh=text,
        loss=abs(loss / want_loss - 1),
        grads=max(jax.tree.leaves(far)),
        collectives=collectives(program),
      )


def one_device():
  """Returns the mesh without others."""
  return sharding.make_mesh(devices=1)


if __name__ == "__main__":
  main(*sys.argv[1:])
