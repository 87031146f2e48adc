"""Figures of the report."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mmfm_jax.metrics.statistics import CALIBRATION_BINS, Confidence, Measure
from mmfm_jax.page import COLOURS, STYLE, drawn, empty_figure


def forest(measures: dict[str, Measure], reference: float | None, unit: str) -> Figure:
    """One row a measure: a dot at its value, a line along its interval, and its chance level where it has one."""
    rows = {name: m for name, m in measures.items() if not name.endswith("_chance")}
    with matplotlib.rc_context(STYLE):
        figure = empty_figure(8, 0.7 + 0.24 * len(rows))
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
        axes.set_yticks(range(len(rows)), [drawn(name) for name in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(drawn(unit))
        axes.grid(axis="x", color="#eeeeee")
        axes.set_axisbelow(True)
        return figure


def roc(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Sensitivity against one minus specificity of each predictor; `curves` holds (false, true) positive rates."""
    with matplotlib.rc_context(STYLE):
        figure = empty_figure(4.2, 4)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        for (name, (false_positive, true_positive)), colour in zip(curves.items(), COLOURS):
            axes.plot(false_positive, true_positive, color=colour, linewidth=1.4, label=drawn(name))
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=drawn(title), aspect="equal")
        axes.legend(loc="lower right", fontsize=7.5)
        return figure


def calibration(claimed: Confidence, title: str) -> Figure:
    """Share of studies in which the claim came true, by claimed probability, above how many made each claim."""
    with matplotlib.rc_context(STYLE):
        figure = empty_figure(4.2, 4)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        bins = [claimed.bin == b for b in range(CALIBRATION_BINS) if (claimed.bin == b).any()]
        axes.plot(
            [claimed.probability[b].mean() for b in bins], [claimed.outcome[b].mean() for b in bins],
            "o-", color=COLOURS[0], markersize=4.5, linewidth=1.2,
        )  # fmt: skip
        axes.set(ylabel="observed share", title=drawn(title), xlim=(0, 1), ylim=(-0.02, 1.02))
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
        figure = empty_figure(9, 2.1 * lines)
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
            axes.set_title(drawn(name), fontsize=8.5)
            axes.tick_params(labelsize=7)
        return figure
