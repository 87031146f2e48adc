"""Where a label comes from: how well it is told from each modality alone, each pair, and all."""

from __future__ import annotations

import numpy as np

from mmfm_jax.metrics.findings import Findings, Passage
from mmfm_jax.metrics.held_out import HeldOut, LogProbability, View, view_name, views_of
from mmfm_jax.metrics.label import TOLD, UNTRAINED
from mmfm_jax.metrics.statistics import ClassAuroc, Measure

PROBE = "linear_probe"
NOTE = (
    "AUROC on held-out patients of linear probes of the fused features of the model that is shown these modalities "
    "alone, with its 95% interval; below, of the same model before its training. A dagger: a text that is shown "
    "states the label, so the probe is told the answer."
)


def origin(
    probes: dict[str, dict[View, LogProbability]],
    untrained: dict[str, dict[View, LogProbability]],
    modalities: tuple[str, ...],
    from_text: frozenset[str],
    held_out: HeldOut,
) -> Findings:
    """Of every label that `probes` are of, by view: measures, and one table of all. `from_text`: labels that a text
    states; what is shown it is named TOLD."""
    from mmfm_jax.page import table

    views = views_of(modalities)[::-1]
    shown = [" and ".join(m for m in modalities if m not in view) for view in views]
    measures: dict[str, Measure] = {}
    rows: list[tuple[str, ...]] = []
    for label, by_view in probes.items():
        given = held_out.test.labels[label]
        known = given >= 0
        if len(np.unique(given[known])) < 2 or not by_view:
            continue
        patients = held_out.test.patients[known]
        cells, below = [label], ["before training"]
        for view in views:
            told = label in from_text and "text" not in view
            front = f"{label}/{TOLD if told else ''}"
            for of, prefix, line in ((by_view, "", cells), (untrained.get(label, {}), UNTRAINED, below)):
                if view not in of:
                    continue
                m = held_out.bootstrap(ClassAuroc(of[view][known], given[known]), patients)
                measures[f"{front}{prefix}{view_name(view, PROBE)}/auroc"] = m
                line.append(f"{m.value:.3f}{'†' if told else ''}" + (_interval(m) if line is cells else ""))
        rows += [tuple(cells), *([tuple(below)] if len(below) > 1 else [])]
    if not rows:
        return Findings()
    return Findings(measures, (Passage("Where each label comes from", NOTE, table(("label", *shown), rows)),))


def _interval(m: Measure) -> str:
    return f" ({m.low:.2f} to {m.high:.2f})" if m.low is not None else ""
