"""Figures of the report, each an SVG that stands alone inside the page."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from mmfm_jax.evaluate.metrics import CALIBRATION_BINS, Confidence, Measure

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
}


def _figure(width: float, height: float) -> Figure:
    """An empty figure, inches; without pyplot, so it needs no display and nothing is left open."""
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def to_data_uri(figure: Figure) -> str:
    """The figure as an address that an <img> holds in itself."""
    svg = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode("ascii")


def forest(measures: dict[str, Measure], reference: float | None, unit: str) -> Figure:
    """One row a measure: a dot at its value, a line along its interval, and its chance level where it has one."""
    rows = {name: m for name, m in measures.items() if not name.endswith("_chance")}
    with matplotlib.rc_context(STYLE):
        figure = _figure(8, 0.7 + 0.24 * len(rows))
        axes = figure.add_subplot()
        for y, (name, m) in enumerate(rows.items()):
            if m.low is not None and m.high is not None:
                axes.plot([m.low, m.high], [y, y], color=COLOURS[0], linewidth=1.6, solid_capstyle="butt")
            axes.plot(m.value, y, "o", color=COLOURS[0], markersize=4.5)
            level = measures.get(f"{name}_chance")
            if level:
                axes.plot(level.value, y, "|", color="#777777", markersize=9)
        if reference is not None:
            axes.axvline(reference, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(unit)
        axes.grid(axis="x", color="#eeeeee")
        axes.set_axisbelow(True)
        return figure


def roc(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Sensitivity against one minus specificity of each predictor; `curves` holds (false, true) positive rates."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.2, 4)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        for (name, (false_positive, true_positive)), colour in zip(curves.items(), COLOURS):
            axes.plot(false_positive, true_positive, color=colour, linewidth=1.4, label=name)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=title, aspect="equal")
        axes.legend(loc="lower right", fontsize=7.5)
        return figure


def calibration(claimed: Confidence, title: str) -> Figure:
    """Share of studies in which the claim came true, by claimed probability, above how many made each claim."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.2, 4)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        bins = [claimed.bin == b for b in range(CALIBRATION_BINS) if (claimed.bin == b).any()]
        axes.plot(
            [claimed.probability[b].mean() for b in bins], [claimed.outcome[b].mean() for b in bins],
            "o-", color=COLOURS[0], markersize=4.5, linewidth=1.2,
        )  # fmt: skip
        axes.set(ylabel="observed share", title=title, xlim=(0, 1), ylim=(-0.02, 1.02))
        below.hist(claimed.probability, bins=CALIBRATION_BINS, range=(0, 1), color="#bbbbbb", rwidth=0.9)
        below.set(xlabel="claimed probability", ylabel="studies")
        return figure


def training_curves(history: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """One small panel a quantity: (steps, values); `validation/X` is drawn in the panel of `X`."""
    panels = [name for name in history if not name.startswith("validation/")]
    panels += [name for name in history if name.startswith("validation/") and name.split("/", 1)[1] not in panels]
    columns = 3
    lines = max(1, math.ceil(len(panels) / columns))
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 2.1 * lines)
        for place, name in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, place)
            for key, colour, label in (
                (name, COLOURS[0], "training"),
                (f"validation/{name}", COLOURS[1], "validation"),
            ):
                if key in history:
                    axes.plot(*history[key], color=colour, linewidth=1.1, label=label)
            if f"validation/{name}" in history:
                axes.legend(fontsize=7)
            axes.set_title(name, fontsize=8.5)
            axes.tick_params(labelsize=7)
        return figure


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
