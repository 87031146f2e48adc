"""Images of held-out studies beside texts, for the report."""

from __future__ import annotations

from dataclasses import dataclass

from mmfm_jax.data.inspect.slices import Slice, scaled_slice
from mmfm_jax.metrics.held_out import Words


@dataclass(frozen=True)
class Example:
    """A test study's image beside the text of the gallery nearest to it and its own."""

    image: Slice
    nearest: str
    own: str
    rank: float
    """Expected rank of its own text."""


def first_of(readings: list[Words]) -> str:
    """The first text of each field, and how many more readings there are."""
    first, *more = readings
    return " ".join(first.values()) + (f" (and {len(more)} more)" if more else "")


def examples_html(shown: list[Example]) -> str:
    """All in frames of one physical size: that of the largest. Texts are escaped."""
    from mmfm_jax.page import escaped, image

    extents = [example.image.extent_mm for example in shown]
    frame = max(y for y, _ in extents), max(x for _, x in extents)
    cells = [
        f'<div class="example">{image(scaled_slice(e.image, frame), "Middle slice")}<div>'
        f"<p><b>Nearest</b> {escaped(e.nearest)}</p>"
        f"<p><b>Own (rank {e.rank:g})</b> {escaped(e.own)}</p></div></div>"
        for e in shown
    ]
    return f'<div class="examples">{"".join(cells)}</div>'
