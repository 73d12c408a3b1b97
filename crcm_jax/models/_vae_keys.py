"""The keys of a Wan autoencoder: the original's and diffusers'.

The original numbers the modules of each trunk through, `downsamples.0` to
`upsamples.14`; diffusers does so in the encoder and groups the decoder's by
resolution.
"""

from typing import NamedTuple

from crcm_jax.models._keys import Entry, Keys, Network, Shapes
from crcm_jax.models._vae_config import Stage, VaeConfig, WAN_VAE


class _Names(NamedTuple):
  """What a layout calls the parts."""

  norm_1: str
  conv_1: str
  norm_2: str
  conv_2: str
  shortcut: str
  middle_0: str
  attention: str
  middle_1: str
  conv_in: str
  out_norm: str
  out_conv: str
  moments: str
  latents: str


_NAMES = {
  "wan": _Names(
    *("residual.0", "residual.2", "residual.3", "residual.6", "shortcut"),
    *("middle.0", "middle.1", "middle.2"),
    *("conv1", "head.0", "head.2", "conv1", "conv2"),
  ),
  "diffusers": _Names(
    *("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    *("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    *("conv_in", "norm_out", "conv_out", "quant_conv", "post_quant_conv"),
  ),
}


def _table(config: VaeConfig, layout: str) -> dict[str, Entry]:
  keys, names, c = Keys(), _NAMES[layout], config.channels
  down, up = config.encoder_stages(), config.decoder_stages()
  top = down[-1].outputs
  keys.conv(names.moments, "encoder/moments", (1, 1, 1), 2 * c, 2 * c)
  keys.conv(names.latents, "decoder/latents", (1, 1, 1), c, c)
  _ends(keys, names, "encoder", 3, down[0].inputs, top, 2 * c)
  _ends(keys, names, "decoder", c, up[0].inputs, up[-1].outputs, 3)
  for half in ("encoder", "decoder"):
    _middle(keys, names, half, top)
  flat = 0  # the original's number of a module
  for i, stage in enumerate(down):
    for j in range(config.blocks):
      folder = {"wan": "downsamples", "diffusers": "down_blocks"}[layout]
      key, path = f"encoder.{folder}.{flat}", f"encoder/stage_{i}/block_{j}"
      _block(keys, names, key, path, _inputs(stage, j), stage.outputs)
      flat += 1
    if stage.space:
      key, path = f"encoder.{folder}.{flat}", f"encoder/stage_{i}/resample"
      _resample(keys, key, path, stage, stage.outputs, 1)
      flat += 1
  flat = 0
  for i, stage in enumerate(up):
    for j in range(config.blocks + 1):
      key = {
        "wan": f"decoder.upsamples.{flat}",
        "diffusers": f"decoder.up_blocks.{i}.resnets.{j}",
      }[layout]
      path = f"decoder/stage_{i}/block_{j}"
      _block(keys, names, key, path, _inputs(stage, j), stage.outputs)
      flat += 1
    if stage.space:
      key = {
        "wan": f"decoder.upsamples.{flat}",
        "diffusers": f"decoder.up_blocks.{i}.upsamplers.0",
      }[layout]
      path = f"decoder/stage_{i}/resample"
      _resample(keys, key, path, stage, stage.outputs // 2, 2)
      flat += 1
  return keys.entries


def _inputs(stage: Stage, block: int) -> int:
  return stage.outputs if block else stage.inputs


def _norm(keys: Keys, key: str, path: str, width: int, axes: int = 3) -> None:
  shape = (width, *(1,) * axes)
  keys.array(f"{key}.gamma", f"{path}/scale", shape, ours=(width,))


def _ends(
  keys: Keys,
  names: _Names,
  half: str,
  inputs: int,
  first: int,
  last: int,
  outputs: int,
) -> None:
  kernel = (3, 3, 3)
  path = f"{half}/conv_in/conv"
  keys.conv(f"{half}.{names.conv_in}", path, kernel, inputs, first)
  _norm(keys, f"{half}.{names.out_norm}", f"{half}/out/norm", last)
  path = f"{half}/out/conv/conv"
  keys.conv(f"{half}.{names.out_conv}", path, kernel, last, outputs)


def _block(
  keys: Keys, names: _Names, key: str, path: str, inputs: int, outputs: int
) -> None:
  kernel = (3, 3, 3)
  _norm(keys, f"{key}.{names.norm_1}", f"{path}/norm_1", inputs)
  conv = f"{path}/conv_1/conv"
  keys.conv(f"{key}.{names.conv_1}", conv, kernel, inputs, outputs)
  _norm(keys, f"{key}.{names.norm_2}", f"{path}/norm_2", outputs)
  conv = f"{path}/conv_2/conv"
  keys.conv(f"{key}.{names.conv_2}", conv, kernel, outputs, outputs)
  if inputs != outputs:
    conv = f"{path}/shortcut"
    keys.conv(f"{key}.{names.shortcut}", conv, (1, 1, 1), inputs, outputs)


def _middle(keys: Keys, names: _Names, half: str, c: int) -> None:
  ends = ((names.middle_0, "block_0"), (names.middle_1, "block_1"))
  for name, path in ends:
    _block(keys, names, f"{half}.{name}", f"{half}/middle/{path}", c, c)
  key, path = f"{half}.{names.attention}", f"{half}/middle/attention"
  _norm(keys, f"{key}.norm", f"{path}/norm", c, axes=2)
  keys.conv(f"{key}.to_qkv", f"{path}/qkv", (1, 1), c, 3 * c)
  keys.conv(f"{key}.proj", f"{path}/out", (1, 1), c, c)


def _resample(
  keys: Keys, key: str, path: str, stage: Stage, outputs: int, factor: int
) -> None:
  c = stage.outputs
  keys.conv(f"{key}.resample.1", f"{path}/space", (3, 3), c, outputs)
  if stage.time:
    time = f"{path}/time_conv"
    keys.conv(f"{key}.time_conv", time, (3, 1, 1), c, factor * c)


def _infer(shapes: Shapes, layout: str) -> VaeConfig:
  """Reads the sizes off the shapes; `mean` and `std` are Wan 2.1's."""
  names = _NAMES[layout]
  width = shapes[f"encoder.{names.conv_in}.weight"][0]
  channels = shapes[f"{names.latents}.weight"][0]
  folder = {"wan": "downsamples", "diffusers": "down_blocks"}[layout]
  multipliers, time, blocks, module = [], [], [], 0
  while f"encoder.{folder}.{module}.{names.conv_1}.weight" in shapes:
    start = module
    block = f"encoder.{folder}.{{}}.{names.conv_1}.weight"
    while block.format(module) in shapes:
      module += 1
    blocks.append(module - start)
    multipliers.append(shapes[block.format(module - 1)][0] // width)
    if f"encoder.{folder}.{module}.resample.1.weight" in shapes:
      time.append(f"encoder.{folder}.{module}.time_conv.weight" in shapes)
      module += 1
  if channels != WAN_VAE.channels:
    raise ValueError(
      "`config` must be given for an autoencoder of"
      f" {channels} channels, whose `mean` and `std` are not Wan 2.1's. Pass a"
      " `VaeConfig`."
    )
  return VaeConfig(
    width=width,
    multipliers=tuple(multipliers),
    time=tuple(time),
    blocks=min(blocks, default=0),
    channels=channels,
    mean=WAN_VAE.mean,
    std=WAN_VAE.std,
  )


VAE = Network(
  name="autoencoder",
  config=VaeConfig,
  anchors={
    "wan": "decoder.middle.0.residual.0.gamma",
    "diffusers": "decoder.mid_block.resnets.0.norm1.gamma",
  },
  table=_table,
  infer=_infer,
)
"""The autoencoder of Wan 2.1."""
