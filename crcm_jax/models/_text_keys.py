"""The keys of umT5's encoder: Wan's original's and those of transformers."""

from typing import NamedTuple

from crcm_jax.models._keys import count, Entry, Keys, Network, Shapes
from crcm_jax.models._text_encoder import TextConfig


class _Names(NamedTuple):
  """What a layout calls the parts; those of a block follow its key."""

  table: str
  block: str
  attention_norm: str
  attention: str
  bias: str
  ffn_norm: str
  gate: str
  up: str
  down: str
  norm: str


_NAMES = {
  "wan": _Names(
    table="token_embedding",
    block="blocks",
    attention_norm="norm1",
    attention="attn",
    bias="pos_embedding.embedding",
    ffn_norm="norm2",
    gate="ffn.gate.0",
    up="ffn.fc1",
    down="ffn.fc2",
    norm="norm",
  ),
  "diffusers": _Names(
    table="shared",
    block="encoder.block",
    attention_norm="layer.0.layer_norm",
    attention="layer.0.SelfAttention",
    bias="layer.0.SelfAttention.relative_attention_bias",
    ffn_norm="layer.1.layer_norm",
    gate="layer.1.DenseReluDense.wi_0",
    up="layer.1.DenseReluDense.wi_1",
    down="layer.1.DenseReluDense.wo",
    norm="encoder.final_layer_norm",
  ),
}
_PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


def _table(config: TextConfig, layout: str) -> dict[str, Entry]:
  keys, names, d = Keys(), _NAMES[layout], config.width
  inner = config.heads * config.head_width
  shape = (config.vocabulary, d)
  keys.array(f"{names.table}.weight", "embedding", shape)
  for i in range(config.layers):
    key = f"{names.block}.{i}"
    linear = lambda name, path, inputs, outputs, i=i, key=key: keys.linear(
      f"{key}.{name}", f"blocks/{path}", inputs, outputs, i, bias=False
    )
    for theirs, ours in _PROJECTIONS.items():
      linear(f"{names.attention}.{theirs}", ours, d, inner)
    linear(f"{names.attention}.o", "out", inner, d)
    linear(names.gate, "gate", d, config.ffn_width)
    linear(names.up, "up", d, config.ffn_width)
    linear(names.down, "down", config.ffn_width, d)
    shape = (config.buckets, config.heads)
    keys.array(f"{key}.{names.bias}.weight", "blocks/position_bias", shape, i)
    for name, path in (
      (names.attention_norm, "attention_norm"),
      (names.ffn_norm, "ffn_norm"),
    ):
      keys.array(f"{key}.{name}.weight", f"blocks/{path}/scale", (d,), i)
  keys.array(f"{names.norm}.weight", "norm/scale", (d,))
  return keys.entries


def _infer(shapes: Shapes, layout: str) -> TextConfig:
  names = _NAMES[layout]
  first = f"{names.block}.0"
  vocabulary, width = shapes[f"{names.table}.weight"]
  buckets, heads = shapes[f"{first}.{names.bias}.weight"]
  return TextConfig(
    layers=count(shapes, f"{names.block}.{{}}.{names.gate}.weight"),
    width=width,
    heads=heads,
    head_width=shapes[f"{first}.{names.attention}.q.weight"][0] // heads,
    ffn_width=shapes[f"{first}.{names.gate}.weight"][0],
    vocabulary=vocabulary,
    buckets=buckets,
  )


TEXT = Network(
  name="text encoder",
  config=TextConfig,
  anchors={
    "wan": "blocks.0.attn.q.weight",
    "diffusers": "encoder.block.0.layer.0.SelfAttention.q.weight",
  },
  table=_table,
  infer=_infer,
  aliases={"encoder.embed_tokens.weight": "shared.weight"},
)
"""umT5's encoder, the text encoder of Wan 2.1."""
