"""Draws docs/architecture.svg: how labels are predicted and how the model is trained.

  python tools/draw_architecture.py [--output=docs/architecture.svg]

The figure is plain SVG with text, 800 pixels wide. It has its own background, and dark colors for readers whose
system asks for them, so it is readable on any page.
"""

import argparse
from collections.abc import Mapping, Sequence
import html
from pathlib import Path

WIDTH, HEIGHT = 800, 492
TITLE_SIZE, TEXT_SIZE = 15, 13
_LINE_HEIGHT = 17
_HEAD = 7  # Length of an arrowhead.

_STYLE = """
    text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; text-anchor: middle; fill: #1f2328 }
    .title { font-size: 14px; font-weight: bold }
    .left { text-anchor: start }
    .page { fill: #ffffff; stroke: #d0d7de }
    .loop { fill: none; stroke: #6e7781; stroke-dasharray: 5 4 }
    .input { fill: #ddf4ff; stroke: #218bff }
    .learned { fill: #fff1d6; stroke: #bf8700 }
    .vector { fill: #dafbe1; stroke: #2da44e }
    .step { fill: #f6f8fa; stroke: #6e7781 }
    .line { fill: none; stroke: #57606a; stroke-width: 1.5 }
    .head { fill: #57606a }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 }
      .page { fill: #0d1117; stroke: #30363d }
      .loop { stroke: #8b949e }
      .input { fill: #0c2d6b; stroke: #58a6ff }
      .learned { fill: #4b2900; stroke: #d29922 }
      .vector { fill: #033a16; stroke: #3fb950 }
      .step { fill: #161b22; stroke: #8b949e }
      .line { stroke: #adbac7 }
      .head { fill: #adbac7 }
    }
"""


def _box(kind: str, x: int, y: int, width: int, height: int, title: str, lines: Sequence[str] = ()) -> list[str]:
  """Returns a box with a bold title and lines of text below it, centered."""
  top = y + (height - _LINE_HEIGHT * (1 + len(lines))) / 2 + TEXT_SIZE
  texts = [_text(x + width / 2, top, title, "title")]
  texts += [_text(x + width / 2, top + _LINE_HEIGHT * row, line) for row, line in enumerate(lines, 1)]
  return [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>', *texts]


def _legend(x: int, y: int, meanings: Mapping[str, str]) -> list[str]:
  """Returns a row of colored squares, each followed by its meaning."""
  shapes = []
  for kind, meaning in meanings.items():
    shapes.append(f'<rect class="{kind}" x="{x}" y="{y - 11}" width="13" height="13" rx="2"/>')
    shapes.append(_text(x + 19, y, meaning, "left"))
    x += 40 + 7 * len(meaning)
  return shapes


def _text(x: float, y: float, text: str, kind: str = "") -> str:
  attribute = f' class="{kind}"' if kind else ""
  return f'<text{attribute} x="{x:g}" y="{y:g}">{html.escape(text)}</text>'


def _arrow(*points: tuple[int, int]) -> list[str]:
  """Returns a line through the points with an arrowhead at the last; its pieces are horizontal or vertical."""
  (x0, y0), (x1, y1) = points[-2:]
  dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
  back_x, back_y = x1 - _HEAD * dx, y1 - _HEAD * dy
  line = " ".join(f"{x},{y}" for x, y in [*points[:-1], (back_x, back_y)])
  head = f"{x1},{y1} {back_x - 4 * dy},{back_y - 4 * dx} {back_x + 4 * dy},{back_y + 4 * dx}"
  return [f'<polyline class="line" points="{line}"/>', f'<polygon class="head" points="{head}"/>']


def draw() -> str:
  """Returns the figure as the text of an SVG file."""
  shapes = [
    f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
    _text(20, 28, "Prediction", "title left"),
    *_legend(430, 28, {"input": "input", "learned": "trained by the loss", "vector": "embedding"}),
    # Inputs and the encoder.
    *_box("input", 20, 44, 150, 62, "Query", ["text + images"]),
    *_box("input", 20, 140, 150, 62, "Label", ["text + images"]),
    *_box(
      "learned",
      215,
      44,
      170,
      158,
      "Encoder",
      [
        "one for both:",
        "BERT, Qwen or Llama",
        "",
        "each image is a token:",
        "its SigLIP feature,",
        "mapped by an adapter",
      ],
    ),
    *_arrow((170, 75), (215, 75)),
    *_arrow((170, 171), (215, 171)),
    # Vectors.
    *_box("vector", 430, 44, 150, 62, "Query embedding"),
    *_box("vector", 430, 140, 150, 52, "Label embedding"),
    *_box("learned", 430, 202, 150, 52, "Free vector", ["shared by a cluster"]),
    *_box("vector", 430, 264, 150, 52, "Label centroid", ["mean of its queries"]),
    *_arrow((385, 75), (430, 75)),
    *_arrow((385, 166), (430, 166)),
    # Prototype and search.
    *_box("learned", 625, 140, 155, 176, "Label prototype", ["one transformer", "layer combines", "the three vectors"]),
    *_box("step", 625, 44, 155, 62, "Search (MIPS)", ["top k labels"]),
    *_arrow((580, 75), (625, 75)),
    *_arrow((580, 166), (625, 166)),
    *_arrow((580, 228), (625, 228)),
    *_arrow((580, 290), (625, 290)),
    *_arrow((702, 140), (702, 106)),
    # Training.
    f'<rect class="loop" x="10" y="348" width="{WIDTH - 20}" height="132" rx="6"/>',
    _text(20, 372, "Training loop", "title left"),
    *_box("step", 20, 396, 150, 68, "Batch", ["similar queries", "share one"]),
    *_box("step", 215, 396, 170, 68, "Mining", ["clusters of similar", "queries"]),
    *_box("vector", 430, 396, 150, 68, "Embedding bank", ["latest embedding of", "each training query"]),
    *_box("step", 625, 396, 155, 68, "Loss", ["triplets with the", "hardest negatives"]),
    *_arrow((430, 430), (385, 430)),
    *_arrow((215, 430), (170, 430)),
    *_arrow((140, 396), (140, 202)),
    *_arrow((300, 202), (300, 332), (468, 332), (468, 396)),
    *_arrow((540, 396), (540, 316)),
    *_arrow((702, 316), (702, 396)),
  ]
  body = "\n".join(f"  {shape}" for shape in shapes)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    ' role="img">\n'
    "  <title>One encoder embeds queries and labels; search compares query embeddings with label prototypes.</title>\n"
    f"  <style>{_STYLE}  </style>\n{body}\n</svg>\n"
  )


def main() -> None:
  """Writes the figure to the file that the flag names."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  default = Path(__file__).resolve().parent.parent / "docs" / "architecture.svg"
  parser.add_argument("--output", type=Path, default=default, help="file to write; by default docs/architecture.svg")
  arguments = parser.parse_args()
  arguments.output.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
  main()
