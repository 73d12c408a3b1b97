"""One train step of every stage on eight fake devices and on one.

A program for a process of its own, `python parallel.py STAGE MESH...`: it
prints, for each mesh, the relative distances to one device and the collectives
of the compiled step, as JSON.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
AXES = ("data", "fsdp", "context", "tensor")

CAUSAL = dict(init=dict(student="teacher", teacher="teacher"))
STAGES = {
  "bidirectional_diffusion": dict(),
  "teacher_forcing": dict(),
  "diffusion_forcing": dict(),
  "discrete_consistency": CAUSAL,
  "continuous_consistency": CAUSAL,
  "mean_flow": CAUSAL | dict(network=dict(end_time=True)),
  "ode_regression": CAUSAL,
  "bidirectional_ode_regression": dict(init=dict(real="real")),
  "self_forcing": dict(init=dict(real="real")),
  "joint": dict(init=dict(teacher="teacher", real="real")),
}


def run(*arguments, timeout=900):
  """Runs this file in a process with eight devices; returns what it prints."""
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  done = subprocess.run(
    [sys.executable, __file__, *arguments],
    env=environment,
    timeout=timeout,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


def config(stage):
  """Returns a tiny stage; 12 heads exercise both parts of an exchange."""
  objective = dict(name=stage)
  if stage == "joint":
    parts = ("continuous_consistency", "self_forcing")
    objective |= dict(parts=parts, **{part: {} for part in parts})
  more = dict(STAGES[stage])
  network = dict(
    layers=2,
    width=96,
    heads=12,
    ffn_width=64,
    freq_width=8,
    text_width=8,
    text_length=4,
    in_channels=4,
    out_channels=4,
  )
  if stage in ("self_forcing", "joint"):
    more |= dict(critic={}, critic_optimizer=dict(learning_rate=0.1))
  return (
    dict(
      seed=0,
      steps=1,
      objective=objective,
      optimizer=dict(learning_rate=0.1),
      pattern=dict(first=1, rest=2),
      data=dict(
        name="random_latents",
        batch_size=8,
        frames=3,
        height=4,
        width=8,
        channels=4,
        text_length=4,
        text_width=8,
      ),
      sampling=dict(mid_times={"2": ((5 / 6,),)}, ode_steps=4),
    )
    | more
    | dict(network=network | more.get("network", {}))
  )


def main(stage, *meshes):
  import jax
  import jax.numpy as jnp
  import optax

  from crcm_jax.training import _loop, _networks, read_stage, sharding

  jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  if "FAST" in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)

  # An optimizer whose state is the gradient.
  record = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, *_: (jax.tree.map(jnp.zeros_like, grads), grads),
  )
  single = read_stage(stage, config(stage))
  single = dataclasses.replace(
    single, optimizers=dict.fromkeys(single.optimizers, record)
  )

  def params(role):
    """Parameters of which none is zero."""
    params = _networks.init_params(single.model, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(sum(map(ord, role))), len(leaves))
    return tree.unflatten(
      a + 0.1 * jax.random.normal(k, a.shape)
      for a, k in zip(leaves, keys, strict=True)
    )

  def step(mesh):
    """Returns loss and gradients by phase, and the programs."""
    on = dataclasses.replace(single.on(mesh), optimizers=single.optimizers)
    fake = params("fake") if on.kind.critic else None
    like = _loop._with_shardings(on.state_shapes(), mesh, on.rules)
    where = lambda tree: sharding.shard(tree, mesh, on.rules)
    frozen = {role: params(role) for role in on.kind.frozen}
    frozen = jax.device_put(frozen, where(frozen))
    batch = sharding.place_batch(next(on.dataset.batches(None, 0)), mesh)
    shardings = _loop._shardings(like, frozen, mesh)
    found = {}
    for phase, train in on.train_steps(shardings).items():
      state = on._state(params("student"), fake)
      state = jax.device_put(state, shardings.state)
      compiled = train.lower(state, frozen, batch, on.run_key()).compile()
      state, metrics = compiled(state, frozen, batch, on.run_key())
      grads = {
        "student": state.student_opt_state,
        "critic": state.fake_opt_state,
      }
      assert int(state.skipped) == 0
      wrong = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b, a.ndim),
        state,
        shardings.state,
      )
      assert all(jax.tree.leaves(wrong))
      found[phase] = (
        float(metrics["loss"]),
        jax.device_get(grads[phase]),
        compiled,
      )
    return found

  want = step(sharding.make_mesh(devices=1))
  for text in meshes:
    sizes = map(int, text.split("x"))
    got = step(sharding.make_mesh(**dict(zip(AXES, sizes, strict=True))))
    for phase, (loss, grads, compiled) in got.items():
      distance = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
      far = jax.tree.leaves_with_path(
        jax.tree.map(distance, grads, want[phase][1])
      )
      worst = max(far, key=lambda item: item[1])
      if "HLO" in os.environ:
        pathlib.Path(os.environ["HLO"]).write_text(compiled.as_text())
      print(
        json.dumps(
          dict(
            stage=stage,
            phase=phase,
            mesh=text,
            loss=abs(loss / want[phase][0] - 1),
            grads=worst[1],
            where=jax.tree_util.keystr(worst[0]),
            collectives=collectives(compiled.as_text()),
          )
        ),
        flush=True,
      )


def collectives(hlo):
  """Counts the collectives of a program's text by kind."""
  kinds = (
    "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    "|ragged-all-to-all|collective-broadcast"
  )
  found = re.findall(rf" ({kinds})(?:-start)?\(", hlo)
  return dict(sorted(collections.Counter(found).items()))


if __name__ == "__main__":
  main(*sys.argv[1:])
