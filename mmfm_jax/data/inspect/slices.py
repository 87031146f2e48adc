"""Slices of volumes as pictures of true size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:  # a second to import, which who trains need not wait for
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Slice:
    """The middle slice of a volume."""

    pixels: Float[np.ndarray, "y x channel"]
    """Windowed to [0, 1]."""
    spacing_mm: tuple[float, float]
    """Along y x."""

    @property
    def extent_mm(self) -> tuple[float, float]:
        return self.pixels.shape[0] * self.spacing_mm[0], self.pixels.shape[1] * self.spacing_mm[1]


def scaled_slice(image: Slice, extent_mm: tuple[float, float]) -> Figure:
    """The slice in a frame of `extent_mm` (y x), so that frames of one extent show true sizes, with a scale bar."""
    import matplotlib
    from matplotlib.figure import Figure

    from mmfm_jax.page import STYLE

    height, width = image.extent_mm
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * extent_mm[1] / extent_mm[0], 1.5), facecolor="black")
        axes = figure.add_axes((0, 0, 1, 1))
        pixels = image.pixels if image.pixels.shape[-1] == 3 else image.pixels[..., 0]
        box = (-width / 2, width / 2, height / 2, -height / 2)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=box, interpolation="nearest")
        y, x = (e / 2 for e in extent_mm)
        axes.set(xlim=(-x, x), ylim=(y, -y), facecolor="black")
        axes.set_axis_off()
        bar = scale_bar_mm(extent_mm[1])
        axes.plot([0.9 * x - bar, 0.9 * x], [0.88 * y, 0.88 * y], color="white", linewidth=1.5)
        axes.text(0.9 * x - bar / 2, 0.84 * y, f"{bar:g} mm", color="white", ha="center", va="bottom", fontsize=6.5)
        return figure


def scale_bar_mm(extent_mm: float) -> float:
    """The longest of 1, 2, 5, 10, ... mm within a third of the extent."""
    longest = extent_mm / 3
    decade = 10.0 ** math.floor(math.log10(longest))
    return max(step * decade for step in (1, 2, 5) if step * decade <= longest)
