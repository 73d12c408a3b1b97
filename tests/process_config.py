"""A tiny experiment on moving digits, for `crcm train` in several processes.

Its variant is a word for each stage: `process_config.py:diffusion,matching`.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import ml_collections
import tiny

EVALUATED = dict(
  sampling=dict(mid_times={"1": ((),)}, ode_steps=2),
  evaluation=dict(
    classifier="experiments/moving_digits/weights/classifier.safetensors",
    num_clips=24,
    num_reference=24,
    num_examples=1,
    batch_size=24,
  ),
)
"""What a causal stage has beside."""


def get_config(stages="diffusion"):
  """Returns the config of these stages."""
  usual = tiny.config()
  network = usual["network"] | dict(
    text_width=32, text_length=8, in_channels=16, out_channels=16
  )
  config = usual | dict(
    stages=tuple(stages.split(",")),
    network=network,
    data=dict(
      name="moving_digits",
      batch_size=4,
      frames=2,
      train_clips=10,  # two and a half batches: they cross epochs
      test_clips=48,  # what the evaluation of a causal stage needs
    ),
    mesh=dict(data=1, fsdp=1, context=1, tensor=1, devices=None),
    sharding=((".*/(w|kernel)", (None, "fsdp")), (".*", ())),
    loop=usual["loop"]
    | dict(sample_every=0, checkpoint_every=3, data_workers=0),
    matching=tiny.SELF_FORCING,
  )
  config["diffusion"] = tiny.DIFFUSION | dict(steps=6)
  config["causal"] = tiny.DIFFUSION | dict(
    objective=dict(name="teacher_forcing"), steps=2
  )
  if "causal" in config["stages"]:
    config |= EVALUATED
  for stage in ("diffusion", "matching", "causal"):
    if stage not in config["stages"]:
      del config[stage]
  return ml_collections.ConfigDict(config)
