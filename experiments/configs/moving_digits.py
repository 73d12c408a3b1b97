"""Moving digits: distil a causal teacher into a streaming few-step student.

  crcm train --config experiments/configs/moving_digits.py --workdir DIR

Variants, given as `moving_digits.py:VARIANT`:

  (none)        The quickstart. Shipped teachers; the CPU trains the stages
                `consistency` (TF-sCM) and `self_forcing` (SF-DMD with its
                critic), then evaluates. Measured: 6.6 minutes on two cores,
                1.6 GiB.
  from_scratch  The same, and trains the teachers on the CPU first, for far
                fewer steps than the shipped ones (not timed).
  gpu           The same experiment with longer stages, all trained, meant to
                take one GPU about ten minutes (not timed as a whole).
  teachers      The two teachers alone, for a GPU; `crcm export` made the
                shipped weights of them.
  staged        dCM, then sCM from its student, then SF-DMD: the quickstart
                with the stage `discrete` before it (not timed).
  runlocal      Everything from scratch in a few steps, for tests.
  staged_runlocal  `staged` likewise.

Result of the quickstart with seed 0, over 256 held-out captions:

                              Frechet distance   digit accuracy
  real clips                         1.1              98.6 %
  causal teacher, 50 steps           7.6              84.8 %
  causal teacher, 2 steps           20.7              46.3 %
  self_forcing, 2 steps              9.7              82.6 %
"""

from typing import Any

import ml_collections

WEIGHTS = "experiments/moving_digits/weights"


def get_config(variant: str = "quickstart") -> ml_collections.ConfigDict:
  """Returns the config of a variant."""
  variants = {
    "quickstart": _quickstart,
    "from_scratch": _from_scratch,
    "gpu": _gpu,
    "teachers": _teachers,
    "staged": _staged,
    "runlocal": _runlocal,
    "staged_runlocal": _staged_runlocal,
  }
  if variant not in variants:
    raise ValueError(
      f"the variant must be one of {sorted(variants)}; got {variant!r}."
    )
  return ml_collections.ConfigDict(variants[variant]()).lock()


def _shared() -> dict[str, Any]:
  return dict(
    seed=0,
    ema_rate=0.1,
    network=dict(
      layers=4,
      width=96,
      heads=4,
      ffn_width=384,
      freq_width=64,
      text_width=32,
      text_length=8,
    ),
    pattern=dict(first=3, rest=3),
    data=dict(
      name="moving_digits",
      batch_size=16,
      frames=9,
      train_clips=8192,
      test_clips=1024,
    ),
    sampling=dict(
      mid_times={"4": ((15 / 16, 5 / 6, 5 / 8),), "2": ((5 / 6,),), "1": ((),)},
      context="clean",
      ode_steps=50,
      ode_shift=3.0,
      guidance=3.0,
    ),
    loop=dict(
      log_every=1,
      checkpoint_every=100,
      sample_every=100,
      keep=2,
      allow_skipped=0,
      tensorboard=True,
    ),
    mesh=dict(data=None, fsdp=1, context=1, tensor=1, devices=None),
  )


def _evaluation() -> dict[str, Any]:
  return dict(
    classifier=f"{WEIGHTS}/classifier.safetensors",
    num_clips=256,
    num_reference=512,
    num_examples=4,
    batch_size=64,
    seed=0,
  )


def _diffusion(objective, steps) -> dict[str, Any]:
  return dict(
    steps=steps,
    objective=dict(
      name=objective,
      time=dict(name="shifted_uniform", shift=3.0),
      weighting="none",
      caption_dropout=0.1,
      loss_scale=1.0,
    ),
    optimizer=dict(
      learning_rate=1e-3, b1=0.9, weight_decay=0.01, clip_norm=1.0
    ),
  )


def _bidirectional(steps) -> dict[str, Any]:
  return _diffusion("bidirectional_diffusion", steps)


def _causal(steps) -> dict[str, Any]:
  start = dict(init=dict(student="bidirectional"))
  return _diffusion("teacher_forcing", steps) | start


def _discrete(steps, causal, learning_rate=3e-4) -> dict[str, Any]:
  return dict(
    steps=steps,
    objective=dict(
      name="discrete_consistency",
      guidance=3.0,
      total_steps=48,
      skip=1,
      shift=3.0,
      loss_scale=1.0,
    ),
    optimizer=dict(
      learning_rate=learning_rate, b1=0.0, weight_decay=0.01, warmup_steps=20
    ),
    init=dict(student=causal, teacher=causal),
  )


def _consistency(
  steps, causal, learning_rate=3e-4, student=None
) -> dict[str, Any]:
  return dict(
    steps=steps,
    objective=dict(
      name="continuous_consistency",
      time=dict(name="log_normal", mean=-0.8, std=1.6),
      guidance=3.0,
      tangent_warmup=steps // 3,
      loss_scale=1.0,
    ),
    optimizer=dict(
      learning_rate=learning_rate, b1=0.0, weight_decay=0.01, warmup_steps=20
    ),
    init=dict(student=student or causal, teacher=causal),
  )


def _self_forcing(steps, bidirectional, learning_rate=1e-4) -> dict[str, Any]:
  return dict(
    steps=steps,
    objective=dict(
      name="self_forcing",
      time=dict(name="shifted_uniform", shift=5.0),
      guidance=2.0,
      replay="parallel",
    ),
    optimizer=dict(
      learning_rate=learning_rate, b1=0.0, weight_decay=0.01, warmup_steps=10
    ),
    critic=dict(time=dict(name="shifted_uniform", shift=5.0)),
    critic_optimizer=dict(
      learning_rate=learning_rate, b1=0.0, weight_decay=0.01, warmup_steps=10
    ),
    alternation=dict(student_every=5, warmup=0),
    init=dict(student="consistency", real=bidirectional),
  )


def _quickstart() -> dict[str, Any]:
  causal = f"{WEIGHTS}/causal.safetensors"
  bidirectional = f"{WEIGHTS}/bidirectional.safetensors"
  return dict(
    stages=("consistency", "self_forcing"),
    **_shared(),
    consistency=_consistency(300, causal),
    self_forcing=_self_forcing(500, bidirectional),
    evaluation=_evaluation(),
  )


def _from_scratch() -> dict[str, Any]:
  return dict(
    stages=("bidirectional", "causal", "consistency", "self_forcing"),
    **_shared(),
    bidirectional=_bidirectional(2000),
    causal=_causal(2000),
    consistency=_consistency(300, "causal"),
    self_forcing=_self_forcing(500, "bidirectional"),
    evaluation=_evaluation(),
  )


def _gpu() -> dict[str, Any]:
  config = _from_scratch()
  config["network"] |= dict(dtype="bfloat16")
  config["data"] |= dict(batch_size=128, in_memory=True)
  config |= dict(
    bidirectional=_bidirectional(12_000),
    causal=_causal(16_000),
    consistency=_consistency(2_000, "causal"),
    self_forcing=_self_forcing(2_500, "bidirectional"),
  )
  config["loop"] |= dict(log_every=20, checkpoint_every=2000, sample_every=4000)
  return config


def _teachers() -> dict[str, Any]:
  config = _gpu()
  for stage in ("consistency", "self_forcing"):
    del config[stage]
  return config | dict(
    stages=("bidirectional", "causal"),
    bidirectional=_bidirectional(40_000),
    causal=_causal(40_000),
  )


def _staged() -> dict[str, Any]:
  causal = f"{WEIGHTS}/causal.safetensors"
  return _quickstart() | dict(
    stages=("discrete", "consistency", "self_forcing"),
    discrete=_discrete(300, causal),
    consistency=_consistency(300, causal, student="discrete"),
  )


def _runlocal() -> dict[str, Any]:
  return _small(_from_scratch()) | dict(
    bidirectional=_bidirectional(4),
    causal=_causal(4),
    consistency=_consistency(4, "causal"),
    self_forcing=_self_forcing(6, "bidirectional"),
  )


def _staged_runlocal() -> dict[str, Any]:
  return _runlocal() | dict(
    stages=(
      *("bidirectional", "causal"),
      *("discrete", "consistency", "self_forcing"),
    ),
    discrete=_discrete(4, "causal"),
    consistency=_consistency(4, "causal", student="discrete"),
  )


def _small(config: dict[str, Any]) -> dict[str, Any]:
  """Shrinks the network, the data and the evaluation to a CPU minute."""
  config["network"] |= dict(layers=2, width=16, heads=2, ffn_width=32)
  config["data"] |= dict(batch_size=4, frames=6, train_clips=64, test_clips=96)
  config["sampling"] |= dict(ode_steps=6)
  config["loop"] |= dict(checkpoint_every=2, sample_every=4)
  config["evaluation"] |= dict(
    num_clips=32, num_reference=64, num_examples=2, batch_size=32
  )
  return config
