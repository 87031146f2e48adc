"""What our pages are made of: one HTML file, complete in itself, with figures inside it and nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mmfm_jax.screen import printable

# Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "svg.hashsalt": "mmfm",  # the same figure gives the same bytes
    "text.parse_math": False,  # names of others are text: a dollar in them is no formula
    "text.usetex": False,
}
_MOST_DRAWN = 80
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 0.95rem; margin: 1.4rem 0 0.3rem; }
p.note { color: #555; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 0.88rem; margin: 0.5rem 0; } th { text-align: left; }
td, th { padding: 0.15rem 0.9rem 0.15rem 0; border-bottom: 1px solid #eee; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .montage { display: flex; flex-wrap: wrap; gap: 0.25rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(28rem, 1fr)); gap: 1rem; }
.example { display: flex; gap: 0.8rem; font-size: 0.82rem; line-height: 1.35; } .example img { flex: none; }
.example p { margin: 0 0 0.4rem; } .example b { color: #555; font-weight: 600; }
"""


def drawn(text: str) -> str:
    """Text of others as a figure shows it: nothing that cannot be seen, and cut where it would fill the figure."""
    text = printable(text[: 2 * _MOST_DRAWN])
    return text if len(text) <= _MOST_DRAWN else f"{text[: _MOST_DRAWN - 1]}\u2026"


def escaped(text: str) -> str:
    """Text of others as HTML shows it; lines stay lines."""
    return html.escape(printable(text, "\n"))


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure, inches; without pyplot, so it needs no display and nothing is left open."""
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def to_data_uri(figure: Figure) -> str:
    """The figure as an address that an <img> holds in itself."""
    svg = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it is drawn as a box
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode("ascii")


def document(title: str, body: Iterable[str]) -> str:
    """The whole page; `body` is HTML already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def note(text: str) -> str:
    return f'<p class="note">{escaped(text)}</p>'


def image(figure: Figure, description: str) -> str:
    return f'<img alt="{escaped(description)}" src="{to_data_uri(figure)}">'


def side_by_side(images: Iterable[str], kind: str = "pair") -> str:
    """`kind`: "pair" for figures, "montage" for small pictures close together."""
    return f'<div class="{kind}">{"".join(images)}</div>'


def table(header: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> str:
    """The first `texts` columns are text, the others numbers, set to the right."""

    def cells(tag: str, row: Iterable[str]) -> str:
        kinds = ("" if i < texts else ' class="number"' for i in itertools.count())
        return "".join(f"<{tag}{kind}>{escaped(cell)}</{tag}>" for cell, kind in zip(row, kinds))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{lines}</table>"
