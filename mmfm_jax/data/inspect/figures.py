"""Figures of `inspect.html`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmfm_jax.page import COLOURS, STYLE, drawn, empty_figure

_ACROSS = 4
_MOST_PATTERNS = 16
_MOST_WORDS = 12
_MANY = 400
_MOST_DRAWN = 1e15


def histograms(by_name: Mapping[str, Mapping[str, np.ndarray]], axis: Mapping[str, str], of: str) -> Figure:
    """A panel a name: how often values occur, one colour a split, stacked.

    `by_name`: values by split, none of them NaN; `axis`: what the horizontal axis shows; `of`: what is counted. Bins
    span all values or, of many, the 0.5th to the 99.5th percentile; values beyond are counted in the title.
    """

    def draw(axes: Axes, name: str) -> None:
        values = by_name[name]
        every = np.concatenate(list(values.values()))
        low, high = np.percentile(every, [0.5, 99.5] if len(every) >= _MANY else [0, 100])
        if not np.abs(every).max() < _MOST_DRAWN:
            axes.set_title(f"{drawn(name)} (too large to draw)", fontsize=8.5)
            return
        whole = all((v == np.round(v)).all() for v in values.values())
        if whole and high - low <= 30:
            bins = np.arange(math.floor(low), math.ceil(high) + 2) - 0.5
        else:
            bins = np.linspace(low, high if high > low else low + 1, 25)
        beyond = sum(int(((v < bins[0]) | (v > bins[-1])).sum()) for v in values.values())
        axes.hist(
            list(values.values()),
            bins=bins.tolist(),
            stacked=True,
            color=COLOURS[: len(values)],
            label=[drawn(split) for split in values],
        )
        axes.set_title(f"{drawn(name)}{f' ({beyond:,} beyond)' if beyond else ''}", fontsize=8.5)
        axes.set_xlabel(drawn(axis[name]), fontsize=7.5)

    splits = list(dict.fromkeys(split for values in by_name.values() for split in values))
    return _panels(list(by_name), draw, of, splits)


def bars(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """A panel a column: studies of each word, the most frequent first when there are many."""

    def draw(axes: Axes, name: str) -> None:
        held = dict(counts[name])
        if len(held) > _MOST_WORDS:
            kept = sorted(held, key=lambda word: -held[word])[:_MOST_WORDS]
            held = {word: held[word] for word in kept} | {
                f"{len(held) - len(kept)} others": sum(n for word, n in held.items() if word not in kept)
            }
        words = [word if len(word) <= 22 else f"{word[:21]}\u2026" for word in map(drawn, held)]
        axes.barh(range(len(held)), list(held.values()), color=COLOURS[0])
        axes.set_yticks(range(len(held)), words)
        axes.invert_yaxis()
        axes.set_title(drawn(name), fontsize=8.5)

    return _panels(list(counts), draw, "", [], across=3)


def missing(present: Mapping[str, np.ndarray]) -> Figure:
    """Which parts studies have together: a row for each of the most frequent patterns, dark where the part is there.

    `present`: by part, bool [studies]. Above stands the share of studies that has the part.
    """
    held = np.stack(list(present.values()), axis=1)
    patterns, counts = np.unique(held, axis=0, return_counts=True)
    order = np.lexsort((*patterns.T, -counts))[:_MOST_PATTERNS]
    patterns, counts = patterns[order], counts[order]
    with matplotlib.rc_context(STYLE):
        figure = empty_figure(min(12, 2.6 + 0.42 * len(present)), 1.9 + 0.21 * len(patterns))
        axes = figure.add_subplot()
        axes.imshow(np.where(patterns, 0.35, 0.93), cmap="gray", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(
            np.arange(len(present)), [f"{drawn(name)}  {held[:, i].mean():.0%}" for i, name in enumerate(present)]
        )
        axes.tick_params(axis="x", rotation=60, top=True, labeltop=True, bottom=False, labelbottom=False, labelsize=8)
        for label in axes.get_xticklabels():
            label.set(ha="left", rotation_mode="anchor")
        axes.set_yticks(range(len(counts)), [f"{n:,} ({n / len(held):.1%})" for n in counts], fontsize=7.5)
        axes.set_xticks(np.arange(1, len(present)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(counts)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="both", length=0)
        axes.set_ylabel("studies")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure


def _panels(
    names: Sequence[str], draw: Callable[[Axes, str], None], of: str, legend: Sequence[str], across: int = _ACROSS
) -> Figure:
    lines = math.ceil(len(names) / across)
    with matplotlib.rc_context(STYLE):
        figure = empty_figure(9.6, 1.9 * lines + 0.3 * (len(legend) > 1))
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(lines, across, place)
            draw(axes, name)
            axes.tick_params(labelsize=7)
            if place % across == 1:
                axes.set_ylabel(of, fontsize=7.5)
        if len(legend) > 1:
            patches = [Patch(color=colour, label=drawn(name)) for name, colour in zip(legend, COLOURS)]
            figure.legend(handles=patches, loc="outside upper left", ncols=len(legend), fontsize=8)
        return figure
