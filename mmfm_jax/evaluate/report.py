"""`report.html`: one page, complete in itself, that shows a reader what a run learnt.

It names no patient, path or machine. It does show a few images and texts of the store.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mmfm_jax.files import replace
from mmfm_jax.metrics.findings import Exhibit, Findings, Forest, Panel, Passage
from mmfm_jax.metrics.statistics import Measure

NOT_DRAWN = {"step", "time", "batch_checksum", "start", "goodput"}
BOOKKEEPING = ("seconds/", "start/", "badput/")  # of the run's time: not a curve over its steps
History = dict[str, tuple[np.ndarray, np.ndarray]]


def write_report(run: Path, title: str, facts: str, findings: Findings) -> None:
    """Writes `report.html` in the run folder, whole or not at all, for its owner alone: it shows texts and slices."""
    page = render(title, facts, findings, read_history(run / "metrics.jsonl"))
    replace(run / "report.html", page, private=True)


def render(title: str, facts: str, findings: Findings, history: History) -> str:
    """The page; sections with nothing to show are left out."""
    from mmfm_jax.metrics import figures
    from mmfm_jax.page import document, escaped, image, note

    body = [
        f"<h1>{escaped(title)}</h1>",
        *(f"<p>{escaped(said)}</p>" for said in findings.headlines),
        note(facts),
        *map(note, findings.notes),
    ]
    for heading, exhibits in by_heading(findings.exhibits).items():
        notes = dict.fromkeys(exhibit.note for exhibit in exhibits if exhibit.note)
        body += [f"<h2>{escaped(heading)}</h2>", *map(note, notes), *pieces(exhibits)]
    if history:
        body += ["<h2>Training</h2>", image(figures.training_curves(history), "Training curves")]
    body += ["<h2>All measures</h2>", _table(findings.measures)]
    return document(title, body)


def by_heading(exhibits: tuple[Exhibit, ...]) -> dict[str, list[Exhibit]]:
    """Forests first, then panels, then passages, each kind in the order in which tasks gave them."""
    found: dict[str, list[Exhibit]] = {}
    for kind in (Forest, Panel, Passage):
        for exhibit in exhibits:
            if isinstance(exhibit, kind):
                found.setdefault(exhibit.heading, []).append(exhibit)
    return found


def pieces(exhibits: list[Exhibit]) -> list[str]:
    """The HTML of what stands under one heading: forests of one unit in one figure, panels side by side."""
    from mmfm_jax.metrics import figures
    from mmfm_jax.page import image, side_by_side

    forests: dict[tuple[str, float | None], dict[str, Measure]] = {}
    panels, passages = [], []
    for exhibit in exhibits:
        if isinstance(exhibit, Forest):
            forests.setdefault((exhibit.unit, exhibit.reference), {}).update(exhibit.measures)
        elif isinstance(exhibit, Panel):
            panels.append(image(exhibit.draw(), exhibit.description))
        else:
            passages.append(exhibit.html)
    drawn = [
        image(figures.forest(measures, reference, unit), f"Forest plot of {unit}")
        for (unit, reference), measures in forests.items()
    ]
    return [*drawn, *([side_by_side(panels)] if panels else []), *passages]


def read_history(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every number in a metrics.jsonl; a step logged again after a resume counts once."""
    history: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill in the middle of a write
        for key, value in record.items():
            if key not in NOT_DRAWN and not key.startswith(BOOKKEEPING) and isinstance(value, int | float):
                history.setdefault(key, {})[record["step"]] = value
    return {
        key: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for key, values in history.items()
    }


def _table(measures: dict[str, Measure]) -> str:
    from mmfm_jax.page import table

    rows = []
    for name, m in measures.items():
        interval = f"{m.low:.3f} to {m.high:.3f}" if m.low is not None else ""
        rows.append((name, f"{m.value:.3f}", interval, str(m.n)))
    return table(("measure", "value", "95% interval", "studies"), rows)
