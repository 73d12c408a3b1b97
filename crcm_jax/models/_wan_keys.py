"""The keys of a Wan transformer, in three layouts.

* "wan": the original's, whose input layer is a Conv3d;
* "rcm": the same names, the input layer a Linear of flattened patches;
* "diffusers": `WanTransformer3DModel`.

The input layer's features run channel slowest there, channel fastest here.
"""

from typing import NamedTuple

import numpy as np

from crcm_jax.models._config import WanConfig
from crcm_jax.models._keys import count, Entry, Keys, Network, Shapes


class _Names(NamedTuple):
  """What a layout calls the parts."""

  patches: str
  text: tuple[str, str]
  time: tuple[str, str]
  time_projection: str
  modulation: str
  self_attention: str
  cross_attention: str
  projections: tuple[str, str, str, str]
  cross_norm: str
  ffn: tuple[str, str]
  head_modulation: str
  head: str
  image: tuple[str, str, str, str]
  image_attention: tuple[str, str, str]


_WAN = _Names(
  patches="patch_embedding",
  text=("text_embedding.0", "text_embedding.2"),
  time=("time_embedding.0", "time_embedding.2"),
  time_projection="time_projection.1",
  modulation="modulation",
  self_attention="self_attn",
  cross_attention="cross_attn",
  projections=("q", "k", "v", "o"),
  cross_norm="norm3",
  ffn=("ffn.0", "ffn.2"),
  head_modulation="head.modulation",
  head="head.head",
  image=(
    "img_emb.proj.0",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "img_emb.proj.4",
  ),
  image_attention=("k_img", "v_img", "norm_k_img"),
)
_EMBEDDER = "condition_embedder"
_DIFFUSERS = _Names(
  patches="patch_embedding",
  text=(
    f"{_EMBEDDER}.text_embedder.linear_1",
    f"{_EMBEDDER}.text_embedder.linear_2",
  ),
  time=(
    f"{_EMBEDDER}.time_embedder.linear_1",
    f"{_EMBEDDER}.time_embedder.linear_2",
  ),
  time_projection=f"{_EMBEDDER}.time_proj",
  modulation="scale_shift_table",
  self_attention="attn1",
  cross_attention="attn2",
  projections=("to_q", "to_k", "to_v", "to_out.0"),
  cross_norm="norm2",
  ffn=("ffn.net.0.proj", "ffn.net.2"),
  head_modulation="scale_shift_table",
  head="proj_out",
  image=(
    f"{_EMBEDDER}.image_embedder.norm1",
    f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
    f"{_EMBEDDER}.image_embedder.ff.net.2",
    f"{_EMBEDDER}.image_embedder.norm2",
  ),
  image_attention=("add_k_proj", "add_v_proj", "norm_added_k"),
)
_NAMES = {"wan": _WAN, "rcm": _WAN, "diffusers": _DIFFUSERS}


def _table(config: WanConfig, layout: str) -> dict[str, Entry]:
  keys, names = Keys(), _NAMES[layout]
  d, pixels = config.width, config.patch[1] * config.patch[2]
  keys.entries[f"{names.patches}.weight"] = _patch_entry(config, layout)
  keys.array(f"{names.patches}.bias", "patch_embedding/bias", (d,))
  keys.linear(names.text[0], "text_embedding/up", config.text_width, d)
  keys.linear(names.text[1], "text_embedding/down", d, d)
  keys.linear(names.time[0], "time_embedding/up", config.freq_width, d)
  keys.linear(names.time[1], "time_embedding/down", d, d)
  if config.end_time:  # ours: no released Wan has it
    keys.linear("end_embedding.0", "end_embedding/up", config.freq_width, d)
    keys.linear("end_embedding.2", "end_embedding/down", d, d)
  keys.linear(names.time_projection, "time_projection", d, 6 * d)
  if config.image_width is not None:
    _image(keys, names, config.image_width, d)
  for i in range(config.layers):
    _block(keys, names, config, i)
  _modulation(keys, names.head_modulation, "head/modulation", 2, d)
  keys.linear(names.head, "head/out", d, pixels * config.out_channels)
  return keys.entries


def _block(keys: Keys, names: _Names, config: WanConfig, i: int) -> None:
  d, key = config.width, f"blocks.{i}"
  modulation = f"{key}.{names.modulation}"
  _modulation(keys, modulation, "blocks/modulation", 6, d, i)
  own, cross = f"{key}.{names.self_attention}", f"{key}.{names.cross_attention}"
  _attention(keys, names, own, "blocks/self_attention", d, i)
  _attention(keys, names, cross, "blocks/cross_attention", d, i)
  if config.image_width is not None:
    path = "blocks/cross_attention"
    theirs = [f"{cross}.{name}" for name in names.image_attention]
    keys.linear(theirs[0], f"{path}/image_key", d, d, i)
    keys.linear(theirs[1], f"{path}/image_value", d, d, i)
    keys.array(f"{theirs[2]}.weight", f"{path}/image_key_norm/scale", (d,), i)
  _norm(keys, f"{key}.{names.cross_norm}", "blocks/cross_norm", d, i)
  up, down = names.ffn
  keys.linear(f"{key}.{up}", "blocks/ffn/up", d, config.ffn_width, i)
  keys.linear(f"{key}.{down}", "blocks/ffn/down", config.ffn_width, d, i)


def _image(keys: Keys, names: _Names, e: int, d: int) -> None:
  (norm_in, up, down, norm_out), path = names.image, "image_embedding"
  _norm(keys, norm_in, f"{path}/norm_in", e)
  keys.linear(up, f"{path}/mlp/up", e, e)
  keys.linear(down, f"{path}/mlp/down", e, d)
  _norm(keys, norm_out, f"{path}/norm_out", d)


def _norm(
  keys: Keys, key: str, path: str, width: int, layer: int | None = None
) -> None:
  keys.array(f"{key}.weight", f"{path}/scale", (width,), layer)
  keys.array(f"{key}.bias", f"{path}/bias", (width,), layer)


def _modulation(
  keys: Keys, key: str, path: str, rows: int, d: int, layer: int | None = None
) -> None:
  keys.array(key, path, (1, rows, d), layer, ours=(rows, d))


def _attention(
  keys: Keys, names: _Names, key: str, path: str, d: int, i: int
) -> None:
  ours = ("query", "key", "value", "out")
  for theirs, name in zip(names.projections, ours, strict=True):
    keys.linear(f"{key}.{theirs}", f"{path}/{name}", d, d, i)
  keys.array(f"{key}.norm_q.weight", f"{path}/query_norm/scale", (d,), i)
  keys.array(f"{key}.norm_k.weight", f"{path}/key_norm/scale", (d,), i)


def _patch_entry(config: WanConfig, layout: str) -> Entry:
  """The input layer: [out, c, 1, y, x] there, [y x c, out] here."""
  _, y, x = config.patch
  c, d = config.in_channels, config.width
  shape = (d, c * y * x) if layout == "rcm" else (d, c, 1, y, x)

  def to_ours(a: np.ndarray) -> np.ndarray:
    return a.reshape(d, c, y, x).transpose(2, 3, 1, 0).reshape(-1, d)

  def to_torch(a: np.ndarray) -> np.ndarray:
    return a.reshape(y, x, c, d).transpose(3, 2, 0, 1).reshape(shape)

  return Entry("patch_embedding/kernel", None, shape, to_ours, to_torch)


def _infer(shapes: Shapes, layout: str) -> WanConfig:
  """Reads sizes off the shapes; prompts are 512 long as in every Wan."""
  names = _NAMES[layout]
  width, *patch = shapes[f"{names.patches}.weight"]
  if width % 128:
    raise ValueError(
      "`config` must be given for a width that is no multiple of 128, since"
      f" the heads cannot be told from the arrays; got width {width}. Pass"
      " `WanConfig.from_wan(its config.json)`."
    )
  image = f"{names.image[1]}.weight"
  return WanConfig(
    layers=count(shapes, f"blocks.{{}}.{names.ffn[0]}.weight"),
    width=width,
    heads=width // 128,
    ffn_width=shapes[f"blocks.0.{names.ffn[0]}.weight"][0],
    freq_width=shapes[f"{names.time[0]}.weight"][1],
    text_width=shapes[f"{names.text[0]}.weight"][1],
    text_length=512,
    in_channels=int(np.prod(patch)) // 4,
    out_channels=shapes[f"{names.head}.weight"][0] // 4,
    image_width=shapes[image][1] if image in shapes else None,
    end_time="end_embedding.0.weight" in shapes,
  )


WAN = Network(
  name="transformer",
  config=WanConfig,
  anchors={
    "wan": "blocks.0.self_attn.q.weight",
    "rcm": "blocks.0.self_attn.q.weight",
    "diffusers": "blocks.0.attn1.to_q.weight",
  },
  table=_table,
  infer=_infer,
  # Transformer Engine's state, tables of positions, and a norm without use.
  unused=r".*\._extra_state|rope_position_embedding\..*|.*\.norm_added_q\.weight",
)
"""The transformer of Wan 2.1, and of what was distilled from it."""
