"""A tiny experiment on random latents, which compiles in seconds."""

import contextlib

import jax

from crcm_jax.training import _experiment

DIFFUSION = dict(
  steps=4,
  objective=dict(name="bidirectional_diffusion"),
  optimizer=dict(learning_rate=1e-2, warmup_steps=0),
)


def config(**changes):
  """Returns a config of one stage, `diffusion`, with changes."""
  return (
    dict(
      stages=("diffusion",),
      seed=0,
      network=dict(
        layers=1,
        width=8,
        heads=1,
        ffn_width=8,
        freq_width=8,
        text_width=4,
        text_length=2,
        in_channels=2,
        out_channels=2,
      ),
      pattern=dict(first=1, rest=1),
      data=dict(
        name="random_latents",
        batch_size=2,
        frames=2,
        height=2,
        width=2,
        channels=2,
        text_length=2,
        text_width=4,
      ),
      loop=dict(checkpoint_every=2, keep=4, tensorboard=False),
      diffusion=DIFFUSION,
    )
    | changes
  )


def stage(**changes):
  """Returns the stage `diffusion`, with changes to it alone."""
  experiment = _experiment.read_experiment(
    config(diffusion=DIFFUSION | changes)
  )
  return experiment.stages["diffusion"]


SELF_FORCING = dict(
  steps=6,
  objective=dict(name="self_forcing", guidance=2.0),
  optimizer=dict(learning_rate=1e-3),
  critic=dict(),
  critic_optimizer=dict(learning_rate=1e-3),
  alternation=dict(student_every=3),
  init=dict(student="diffusion", real="diffusion"),
)


JOINT = SELF_FORCING | dict(
  objective=dict(
    name="joint",
    parts=("continuous_consistency", "self_forcing"),
    continuous_consistency=dict(tangent_warmup=2),
    self_forcing=dict(start=2, guidance=2.0),
  ),
  alternation=dict(student_every=3, warmup=2),
  init=dict(student="diffusion", teacher="diffusion", real="diffusion"),
)

MEAN_FLOW = dict(
  steps=2,
  network=dict(end_time=True),
  objective=dict(name="mean_flow", tangent_warmup=0),
  optimizer=dict(learning_rate=1e-3),
  init=dict(student="diffusion", teacher="diffusion"),
  sampling=dict(solver="mean_flow"),
)

ODE_REGRESSION = dict(
  steps=2,
  objective=dict(name="bidirectional_ode_regression"),
  optimizer=dict(learning_rate=1e-3),
  init=dict(student="diffusion", real="diffusion"),
  sampling=dict(ode_steps=8),
)


@contextlib.contextmanager
def compile_fast():
  """Skips XLA's optimisations, for programs that run a few steps only."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
