"""The settings of Causal-rCM (arXiv 2606.25473, Table 3) for Wan 2.1.

  crcm train --config experiments/configs/paper.py:tf_scm,14b,c1-1 --workdir DIR

The variant is a list: first a stage, or `all`, then what differs from 1.3B,
chunks of 3-3 frames and four steps.

  tf       causal diffusion, teacher forcing       30,000 steps
  df       causal diffusion, diffusion forcing     30,000 steps
  tf_dcm   consistency in discrete time            10,000 steps
  tf_scm   consistency in continuous time           1,000 steps
  sf_dmd   self-forcing, distribution matching     19,200 steps (3,200 student)
  tf_scm_sf_dmd  tf_scm, and after 1,000 steps sf_dmd beside it: their losses
                 add up                            20,200 steps (4,200 student)
  all      tf, tf_scm and sf_dmd, one after another

  1.3b, 14b                       the network
  14b_teachers                    1.3b, teachers and critic of 14b
  c1-1, c3-3, c1-4                frames of the first and of each later chunk
  4step, 2step, 1step             steps of the chunks after the first
  2step_noisy                     two steps, and noisy chunks in the cache
  v5p-32, v5p-64, v5p-128         TPUs to plan for, and a mesh of them

Planned by `crcm plan` (docs/plan.md), the four settings of Table 3:

  tf,v5p-128  tf,14b,v5p-64  tf_scm,14b_teachers,v5p-32
  sf_dmd,14b_teachers,v5p-64

The data are random latents of the size of 81 frames of 832 x 480 pixels: speed
and memory are real, quality is not. The paper trained on tens of H100 GPUs;
set `--config.mesh.fsdp=N` or `--config.mesh.context=N` for several devices (see
docs/sharding.md). Where memory allows, `--config.working_copy=True` and
`--config.network.remat=outputs` are faster (docs/training.md). Expected time
and result on that hardware are the paper's and were not reproduced here.
"""

from typing import Any

import ml_collections

STAGES = ("tf", "df", "tf_dcm", "tf_scm", "sf_dmd", "tf_scm_sf_dmd")

SIZES = {
  "1.3b": dict(layers=30, width=1536, heads=12, ffn_width=8960),
  "14b": dict(layers=40, width=5120, heads=40, ffn_width=13824),
}

TEACHERS = {"14b_teachers": "14b"}

SLICES = {
  "v5p-32": dict(topology="v5p:2x4x4", mesh=dict(fsdp=32)),
  "v5p-64": dict(topology="v5p:4x4x4", mesh=dict(fsdp=64)),
  "v5p-128": dict(topology="v5p:4x4x8", mesh=dict(fsdp=128)),
}
"""TPU slices to plan for, by their number of chips."""

PATTERNS = {
  "c1-1": dict(first=1, rest=1),
  "c3-3": dict(first=3, rest=3),
  "c1-4": dict(first=1, rest=4),
}

FOUR = (15 / 16, 5 / 6, 5 / 8)

SAMPLING = {
  "4step": dict(mid_times={"4": (FOUR,), "2": ((5 / 6,),), "1": ((),)}),
  "2step": dict(mid_times={"4": (FOUR, (5 / 6,))}),
  "1step": dict(mid_times={"4": (FOUR, ())}),
  "2step_noisy": dict(
    mid_times={"4": (FOUR, (5 / 8,))}, context="last_step", context_start=1
  ),
}


def get_config(variant: str = "tf") -> ml_collections.ConfigDict:
  """Returns the config of a variant, such as `"sf_dmd,14b,2step"`."""
  stage, *options = variant.split(",")
  size = _choice(options, SIZES, "1.3b")
  pattern = _choice(options, PATTERNS, "c3-3")
  steps = _choice(options, SAMPLING, "4step")
  teachers = TEACHERS.get(_choice(options, TEACHERS, ""), size)
  planned = SLICES.get(_choice(options, SLICES, ""), {})
  if stage not in (*STAGES, "all") or options:
    raise ValueError(
      f"the variant must be one of {(*STAGES, 'all')}, then any of"
      f" {[*SIZES, *TEACHERS, *PATTERNS, *SAMPLING, *SLICES]}, with commas;"
      f" got {variant!r}."
    )
  stages = ("tf", "tf_scm", "sf_dmd") if stage == "all" else (stage,)
  build = dict(
    tf=_tf,
    df=_df,
    tf_dcm=_tf_dcm,
    tf_scm=_tf_scm,
    sf_dmd=_sf_dmd,
    tf_scm_sf_dmd=_tf_scm_sf_dmd,
  )
  sections = {name: build[name](size, stages) for name in stages}
  if teachers != size:
    sections = {k: _beside(v, teachers) for k, v in sections.items()}
  shared = _shared(size, pattern, steps)
  shared["mesh"] |= planned.get("mesh", {})
  return ml_collections.ConfigDict(
    dict(stages=stages, **shared, **sections)
    | {key: planned[key] for key in planned if key != "mesh"}
  ).lock()


def _beside(config: dict[str, Any], size: str) -> dict[str, Any]:
  """Gives a stage teachers (and a critic) of another size."""
  sources = dict(teacher=f"weights/tf_{size}.safetensors", real=_wan(size))
  sources = {k: v for k, v in sources.items() if k in config["init"]}
  return config | dict(
    networks={role: SIZES[size] for role in sources},
    init=config["init"] | sources,
  )


def _choice(options: list[str], choices: dict[str, Any], default: str) -> str:
  """Removes from `options` the one that is among `choices`."""
  for option in options:
    if option in choices:
      options.remove(option)
      return option
  return default


def _shared(size: str, pattern: str, steps: str) -> dict[str, Any]:
  return dict(
    seed=0,
    ema_rate=0.1,
    working_copy=False,
    network=dict(
      **SIZES[size],
      freq_width=256,
      text_width=4096,
      text_length=512,
      dtype="bfloat16",
      remat="full",
    ),
    pattern=PATTERNS[pattern],
    data=dict(
      name="random_latents", batch_size=64, frames=21, height=60, width=104
    ),
    sampling=dict(
      context="clean",
      context_start=0,
      ode_steps=50,
      ode_shift=3.0,
      guidance=3.0,
    )
    | SAMPLING[steps],
    loop=dict(
      log_every=10,
      checkpoint_every=500,
      sample_every=0,
      keep=2,
      tensorboard=True,
    ),
    mesh=dict(data=None, fsdp=1, context=1, tensor=1, devices=None),
    sharding="wan",
  )


def _adamw(learning_rate: float, b1: float) -> dict[str, Any]:
  return dict(
    learning_rate=learning_rate,
    b1=b1,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    warmup_steps=100,
  )


def _tf(size: str, stages: tuple[str, ...]) -> dict[str, Any]:
  del stages
  return dict(
    steps=30_000,
    data=dict(batch_size={"1.3b": 256, "14b": 64}[size]),
    objective=dict(
      name="teacher_forcing",
      time=dict(name="shifted_uniform", shift=5.0),
      weighting="gaussian_bell",
      caption_dropout=0.1,
      loss_scale=100.0,
    ),
    optimizer=_adamw(1e-5, 0.9),
    init=dict(student=_wan(size)),
  )


def _df(size: str, stages: tuple[str, ...]) -> dict[str, Any]:
  config = _tf(size, stages)
  config["objective"] |= dict(
    name="diffusion_forcing", weighting="none", chunk_times="random"
  )
  return config


def _tf_dcm(size: str, stages: tuple[str, ...]) -> dict[str, Any]:
  return dict(
    steps=10_000,
    data=dict(batch_size=32),
    objective=dict(
      name="discrete_consistency",
      guidance=3.0,
      total_steps=48,
      skip=1,
      shift=3.0,
      loss_scale=100.0,
    ),
    optimizer=_adamw(2e-6, 0.0),
    init=_from_causal(stages),
  )


def _tf_scm(size: str, stages: tuple[str, ...]) -> dict[str, Any]:
  return dict(
    steps=1_000,
    data=dict(batch_size=32),
    objective=dict(
      name="continuous_consistency",
      time=dict(name="log_normal", mean=-0.8, std=1.6),
      guidance=3.0,
      tangent_warmup=1000,
      loss_scale=100.0,
    ),
    optimizer=_adamw(2e-6, 0.0),
    init=_from_causal(stages),
  )


def _sf_dmd(size: str, stages: tuple[str, ...]) -> dict[str, Any]:
  student = "tf_scm" if "tf_scm" in stages else "weights/tf_scm.safetensors"
  return dict(
    steps=19_200,
    data=dict(batch_size=64),
    objective=dict(
      name="self_forcing",
      time=dict(name="shifted_uniform", shift=5.0),
      guidance=5.0,
      replay="parallel",
      loss_scale=1.0,
    ),
    optimizer=_adamw(2e-6, 0.0),
    critic=dict(time=dict(name="shifted_uniform", shift=5.0)),
    critic_optimizer=_adamw(4e-7, 0.0),
    alternation=dict(student_every=6, warmup=0),
    init=dict(student=student, real=_wan(size)),
  )


def _tf_scm_sf_dmd(size: str, stages: tuple[str, ...]) -> dict[str, Any]:
  scm, dmd = _tf_scm(size, stages), _sf_dmd(size, stages)
  warmup = scm["objective"]["tangent_warmup"]
  for config in (scm, dmd):
    del config["objective"]["name"]
  return dmd | dict(
    steps=warmup + dmd["steps"],
    objective=dict(
      name="joint",
      parts=("continuous_consistency", "self_forcing"),
      continuous_consistency=scm["objective"],
      self_forcing=dict(start=warmup, **dmd["objective"]),
    ),
    alternation=dict(student_every=6, warmup=warmup),
    init=scm["init"] | dict(real=_wan(size)),
  )


def _from_causal(stages: tuple[str, ...]) -> dict[str, Any]:
  causal = "tf" if "tf" in stages else "weights/tf.safetensors"
  return dict(student=causal, teacher=causal)


def _wan(size: str) -> str:
  """Wan 2.1 itself, converted: the bidirectional teacher."""
  return f"weights/wan_{size}.safetensors"
