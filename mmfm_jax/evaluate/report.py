"""`report.html`: one page, complete in itself, that shows a reader what a run learnt.

It names no patient, path or machine. It does show a few images and texts of the store.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import roc_curve

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.packing import volume
from mmfm_jax.data.inspect.slices import Slice, scaled_slice
from mmfm_jax.metrics import figures
from mmfm_jax.evaluate.features import FUSED, Features
from mmfm_jax.metrics.statistics import Measure, confidence, retrieval_ranks
from mmfm_jax.evaluate.protocols import Predictions
from mmfm_jax.page import document, image, note, side_by_side, table
from mmfm_jax.train import folder

if TYPE_CHECKING:  # it imports this module
    from mmfm_jax.evaluate.evaluate import Evaluation
    from mmfm_jax.train.checkpoint import TrainedRun

EXAMPLES = 12
NOT_DRAWN = {"step", "time", "batch_checksum", "start", "goodput"}
BOOKKEEPING = ("seconds/", "start/", "badput/")  # of the run's time: not a curve over its steps


@dataclass(frozen=True)
class Example:
    """A test study's image beside the text of the gallery nearest to it and its own."""

    image: Slice
    nearest: str
    own: str
    rank: float
    """Expected rank of its own text."""
    gallery: int
    """Texts it was ranked among."""


def write_report(run: Path, trained: TrainedRun, samples: Samples, result: Evaluation) -> None:
    """Writes `report.html` in the run folder, whole or not at all."""
    experiment = trained.experiment
    shown = examples(result.test, image_text_task(result.test), samples, experiment.seed)
    page = render(
        title=experiment.name,
        facts=(
            f"Step {trained.step}. {len(result.test.rows)} studies of {len(np.unique(result.test.patients))} patients"
            f" of the {experiment.evaluate.split} split, none of whom was trained on. Intervals: 95%, from"
            f" {experiment.evaluate.bootstrap} resamples of patients. For research, not for clinical decisions."
        ),
        measures=result.measures,
        predictions=result.predictions,
        history=read_history(run / "metrics.jsonl"),
        shown=shown,
        notes=result.notes,
    )
    folder.replace(run / "report.html", page)


def render(
    title: str,
    facts: str,
    measures: dict[str, Measure],
    predictions: list[tuple[str, Predictions]],
    history: dict[str, tuple[np.ndarray, np.ndarray]],
    shown: list[Example],
    notes: Iterable[str],
) -> str:
    """The page; sections with nothing to show are left out."""
    body = [f"<h1>{html.escape(title)}</h1>", note(facts), *map(note, notes)]
    aurocs = {name.removesuffix("/auroc"): m for name, m in measures.items() if _is_auroc(name)}
    recalls = {name: m for name, m in measures.items() if "/recall@" in name}
    if aurocs:
        body += [
            "<h2>Telling one class from another</h2>",
            note(
                "AUROC: the chance that a study of the class scores above one without it; 0.5 is guessing, 1 is"
                " perfect. Dot: value on held-out patients. Line: its 95% interval."
            ),
            image(figures.forest(aurocs, 0.5, "AUROC"), "Forest plot of AUROC"),
        ]
    curves = [image(figures.roc(roc_curves(p), name), f"ROC of {name}") for name, p in predictions if _is_binary(p)]
    reliability = [
        image(figures.calibration(confidence(p.by_predictor[FUSED], p.label), name), f"Calibration of {name}")
        for name, p in predictions
        if FUSED in p.by_predictor
    ]
    if curves:
        body += ["<h2>ROC curves</h2>", side_by_side(curves)]
    if reliability:
        body += [
            "<h2>Calibration</h2>",
            note(
                "Of the studies given a probability, the share that had the class; on the dotted line claims come true."
            ),
            side_by_side(reliability),
        ]
    if recalls:
        body += [
            "<h2>Finding a study's partner</h2>",
            note("Recall@k: how often a study's own partner is among the first k found. Grey mark: chance."),
            image(figures.forest(recalls, None, "recall"), "Forest plot of recall"),
        ]
    if shown:
        body += [
            "<h2>Examples</h2>",
            note(
                "Held-out studies drawn at random: middle slice at true scale, the text nearest to the image among"
                f" those of {shown[0].gallery} studies, and the study's own text with its rank. Of several texts of"
                " a study, the mean is what is compared and the first is what is shown."
            ),
            _examples(shown),
        ]
    if history:
        body += ["<h2>Training</h2>", image(figures.training_curves(history), "Training curves")]
    body += ["<h2>All measures</h2>", _table(measures)]
    return document(title, body)


# ---------------------------------------------------------------- what is shown


def roc_curves(of_label: Predictions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """False and true positive rates of the predictors that use all they are given."""
    return {
        name: roc_curve(of_label.label, scores[:, 1] - scores[:, 0])[:2]
        for name, scores in of_label.by_predictor.items()
        if "_without_" not in name
    }


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


def image_text_task(test: Features) -> str | None:
    """The first contrastive task between image and text."""
    return next((task for task, both in test.embeddings.items() if set(both) == {"image", "text"}), None)


def examples(test: Features, task: str | None, samples: Samples, seed: int) -> list[Example]:
    """A few test studies drawn at random with their nearest texts; none when no task compares images with texts."""
    if task is None:
        return []
    image, text = test.embeddings[task]["image"], test.embeddings[task]["text"]
    both = np.flatnonzero(image.present & text.present)
    ranks = retrieval_ranks(image.vectors[both], text.vectors[both], test.same["text"][both])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(both))[:EXAMPLES])
    nearest = (image.vectors[both[chosen]] @ text.vectors[both].T).argmax(axis=1)
    return [
        Example(
            middle_slice(samples, int(test.rows[both[i]])),
            first_reading(samples, int(test.rows[both[j]])),
            first_reading(samples, int(test.rows[both[i]])),
            float(ranks.expected[i]),
            len(both),
        )
        for i, j in zip(chosen, nearest)
    ]


def first_reading(samples: Samples, row: int) -> str:
    """The first text of each field that the model reads, and how many more readings the study has."""
    first, *more = samples.readings(row)
    return " ".join(first.values()) + (f" (and {len(more)} more)" if more else "")


def middle_slice(samples: Samples, row: int) -> Slice:
    """Of the first image role that the study holds."""
    study = samples.read(row, None)
    role = next(role for role, part in (study.images | study.packed).items() if part.present)
    shape = samples.spec.images[role]
    low, high = shape.window
    voxels = volume(study.packed[role], shape) if role in study.packed else np.asarray(study.images[role].voxels)
    pixels = np.clip((voxels[voxels.shape[0] // 2].astype(np.float32) - low) / (high - low), 0, 1)
    held = samples.store.volume_info(role, row)
    assert held is not None
    _, y, x = held[1]
    return Slice(pixels, (y, x))


# ---------------------------------------------------------------- pieces of the page


def _is_auroc(name: str) -> bool:
    return name.endswith("/auroc") and "_minus_" not in name


def _is_binary(of_label: Predictions) -> bool:
    return len(of_label.classes) == 2


def _examples(shown: list[Example]) -> str:
    """All in frames of one physical size: that of the largest."""
    extents = [example.image.extent_mm for example in shown]
    frame = max(y for y, _ in extents), max(x for _, x in extents)
    cells = [
        f'<div class="example">{image(scaled_slice(e.image, frame), "Middle slice")}<div>'
        f"<p><b>Nearest</b> {html.escape(e.nearest)}</p>"
        f"<p><b>Own (rank {e.rank:g})</b> {html.escape(e.own)}</p></div></div>"
        for e in shown
    ]
    return f'<div class="examples">{"".join(cells)}</div>'


def _table(measures: dict[str, Measure]) -> str:
    rows = []
    for name, m in measures.items():
        interval = f"{m.low:.3f} to {m.high:.3f}" if m.low is not None else ""
        rows.append((name, f"{m.value:.3f}", interval, str(m.n)))
    return table(("measure", "value", "95% interval", "studies"), rows)
