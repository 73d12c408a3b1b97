"""Draws docs/images/tiles.svg: how kernels cut a teacher-forcing mask.

python tools/draw_tiles.py
"""

import pathlib

from crcm_jax import kernels

FRAMES, TOKENS, QUERIES, BLOCK, PIXEL = 4, 14, 8, 4, 5
WHOLE, LAST, OWN = "#4c78a8", "#f2a65a", "#72b07c"


def main():
  """Writes the picture."""
  boundaries = tuple(range(0, FRAMES * TOKENS + 1, TOKENS))
  mask = kernels.BlockMask.noisy_rows(boundaries)
  tokens = FRAMES * TOKENS
  tiles, ranges = mask.tile_table(QUERIES, [tokens, tokens])
  parts = [
    _box(at, tokens, *row)
    for at in (0, tokens + 2)
    for row in [(0, tokens, "#eeeeee")]
  ]
  for (top, bottom), *streams in zip(tiles, *ranges, strict=True):
    for offset, spans, whole in zip(
      (0, tokens + 2), streams, (WHOLE, OWN), strict=True
    ):
      for start, stop in spans:
        for at in range(start, stop, BLOCK):
          full = at + BLOCK <= stop
          width = min(BLOCK, stop - at)
          colour = whole if full else LAST
          parts.append(_box(offset + at, width, top, bottom - top, colour))
  side = PIXEL * tokens
  svg = (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * side + 60}" '
    f'height="{side + 50}" font-family="sans-serif" font-size="12">'
    f'<g transform="translate(20, 24)">{"".join(parts)}'
    f'<text x="0" y="-8">keys of the clean stream (context)</text>'
    f'<text x="{side + 2 * PIXEL}" y="-8">keys of the noisy stream (own)</text>'
    f'<text transform="translate(-6, {side}) rotate(-90)">noisy queries</text>'
    "</g></svg>\n"
  )
  pathlib.Path("docs/images/tiles.svg").write_text(svg)


def _box(left, width, top, height, colour):
  return (
    f'<rect x="{PIXEL * left}" y="{PIXEL * top}" width="{PIXEL * width}" '
    f'height="{PIXEL * height}" fill="{colour}" stroke="white"/>'
  )


if __name__ == "__main__":
  main()
