"""`inspect.html`: what a store holds, for the eye of a clinician.

It names no patient, path or machine and shows no text of a study. It does show slices of a few images, so it is kept
where the store is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from mmfm_jax.data.inspect import figures
from mmfm_jax.data.inspect.slices import Slice, scaled_slice
from mmfm_jax.data.inspect.survey import Survey, pictures, reject_counts, survey
from mmfm_jax.data.store.format import local_folder
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError
from mmfm_jax.files import replace
from mmfm_jax.page import document, escaped, image, note, side_by_side, table

NAME = "inspect.html"
_INPUTS = TypeAdapter(dict[str, dict[Literal["inputs", "taken", "refused"], NonNegativeInt]])
_PANELS = 24
"""Columns that get a panel; a store of more is a table, not a picture."""


def write_page(store: StudyStore, out: Path | None) -> Path:
    """Writes the page to `out`, for its owner alone: by default into the store's folder, or, where that is none of
    this user's or may not be written, into the working directory. Returns where it is.

    Raises UserError when it cannot be written."""
    if out is None:
        folder = local_folder(store.url)
        out = (folder if folder is not None and _is_ours(folder) else Path()) / NAME
    replace(out, render(store), private=True, mend="name another file with --out")
    return out


def _is_ours(folder: Path) -> bool:
    return folder.stat().st_uid == os.geteuid() and os.access(folder, os.W_OK)


def render(store: StudyStore) -> str:
    """The page; sections with nothing to show are left out."""
    found = survey(store)
    sections = (_studies, _labels, _images, _numbers, _categories, _texts, _missing, _left_out)
    body = [line for section in sections for line in section(store, found)]
    return document("What the store holds", [*_head(store, found), *body])


def _head(store: StudyStore, found: Survey) -> Iterator[str]:
    patients = sum(counts.patients for counts in store.counts.values())
    yield f"<h1>{len(store):,} studies of {patients:,} patients</h1>"
    if store.file.description:
        yield note(store.file.description)
    looked = (
        "Pictures apart, all studies were looked at."
        if len(found.rows) == len(store)
        else f"Histograms and shares are of {len(found.rows):,} studies, spread evenly over the store; counts by split "
        "are of all."
    )
    yield note(
        f"{looked} No text of a study is on this page, but slices of a few images are: keep it where the store is "
        "kept. For research, not for clinical decisions."
    )


def _studies(store: StudyStore, found: Survey) -> Iterator[str]:
    schema = store.schema
    parts = [f"with {name}" for name in (*schema.images, *schema.texts)]
    rows = []
    for split in _ordered(store.counts):
        counts = store.counts[split]
        held = [counts.images.get(r, 0) for r in schema.images] + [counts.texts.get(t, 0) for t in schema.texts]
        rows.append((split, *(f"{n:,}" for n in (counts.patients, counts.studies, *held))))
    yield "<h2>Splits</h2>"
    yield note("Every patient is in one split. Models learn from train alone.")
    yield table(("split", "patients", "studies", *parts), rows)


def _labels(store: StudyStore, found: Survey) -> Iterator[str]:
    if not store.schema.labels:
        return
    yield "<h2>Labels by split</h2>"
    yield note("Studies, and their share of the labelled ones of the split.")
    ordered = {split: store.counts[split] for split in _ordered(store.counts)}
    rows = []
    for name, label in store.schema.labels.items():
        held = [counts.labels.get(name, {}) for counts in ordered.values()]
        for i, value in enumerate(label.classes):
            cells = [f"{h.get(value, 0):,} ({h.get(value, 0) / max(1, sum(h.values())):.0%})" for h in held]
            rows.append((name if i == 0 else "", value, *cells))
        left = [counts.studies - sum(h.values()) for counts, h in zip(ordered.values(), held)]
        rows.append(("", "not labelled", *(f"{n:,}" for n in left)))
    yield table(("label", "class", *ordered), rows, texts=2)


def _images(store: StudyStore, found: Survey) -> Iterator[str]:
    if not store.schema.images:
        return
    yield "<h2>Images</h2>"
    yield note(
        "Middle slices of studies spread over the store, all of a role at one scale, grey values from the 1st to the "
        "99th percentile. Volumes are shown from below, as radiologists do: the front is up and the patient's right on "
        "the left, as far as their files said where they lie. Images of one slice are shown as stored."
    )
    for role, spec in store.schema.images.items():
        yield f"<h3>{escaped(role)}</h3>"
        words = f"{spec.description} " if spec.description else ""
        yield note(f"{words}{spec.dtype}, {spec.channels} channel{'s' * (spec.channels > 1)}.")
        if len(found.shape[role]):
            if shown := pictures(store, found.having(role), role):
                yield _montage(shown)
            yield _geometry(found.shape[role], found.spacing_mm[role])
        if percentiles := store.stats.images[role].percentiles:
            yield note("Intensity of the train split, by percentile:")
            yield table([f"{p}%" for p in percentiles], [[f"{v:.5g}" for v in percentiles.values()]], texts=0)


def _montage(slices: list[Slice]) -> str:
    """All in frames of one physical size: that of the largest."""
    frame = max(s.extent_mm[0] for s in slices), max(s.extent_mm[1] for s in slices)
    return side_by_side((image(scaled_slice(s, frame), "Middle slice") for s in slices), "montage")


def _geometry(shape: np.ndarray, spacing_mm: np.ndarray) -> str:
    rows = []
    for title, values in (("voxels", shape), ("spacing, mm", spacing_mm), ("extent, mm", shape * spacing_mm)):
        for axis, name in enumerate(("z (feet to head)", "y (back to front)", "x (left to right)")):
            points = np.percentile(values[:, axis], [0, 5, 50, 95, 100])
            rows.append((title if not axis else "", name, *(f"{v:.4g}" for v in points)))
    return table(("", "axis", "least", "5%", "median", "95%", "most"), rows, texts=2)


def _numbers(store: StudyStore, found: Survey) -> Iterator[str]:
    splits = [split for split in _ordered(store.counts) if (found.splits == split).any()]
    shown = {}
    for name, values in found.numbers.items():
        held = {split: values[(found.splits == split) & ~np.isnan(values)] for split in splits}
        if any(len(v) for v in held.values()):
            shown[name] = held
    if not shown:
        return
    columns = store.schema.columns
    yield "<h2>Numbers</h2>"
    yield note("Each histogram stacks the splits: one that looks different from the others is worth a question.")
    for names in _pages(list(shown)):
        drawn = {name: shown[name] for name in names}
        yield image(figures.histograms(drawn, {n: columns[n].unit for n in names}, "studies"), "Histograms of numbers")
    rows = []
    for name, held in shown.items():
        values = np.concatenate(list(held.values()))
        points = (values.mean(), values.std(), *np.percentile(values, [0, 50, 100]))
        lacking = f"{1 - len(values) / len(found.rows):.1%}"
        rows.append((name, columns[name].description, columns[name].unit, *(f"{v:.4g}" for v in points), lacking))
    yield table(("column", "what", "unit", "mean", "sd", "least", "median", "most", "missing"), rows, texts=3)


def _categories(store: StudyStore, found: Survey) -> Iterator[str]:
    if not found.categories:
        return
    yield "<h2>Categories</h2>"
    for names in _pages(list(found.categories)):
        counts = {
            name: dict(found.categories[name]) | {"(missing)": int((~found.present["column", name]).sum())}
            for name in names
        }
        yield image(figures.bars(counts), "Counts of categories")


def _texts(store: StudyStore, found: Survey) -> Iterator[str]:
    shown = {name: {"all": lengths} for name, lengths in found.words.items() if len(lengths)}
    if not shown:
        return
    yield "<h2>Texts</h2>"
    yield note("Words of each text, parted by spaces; a tokenizer makes some 1.3 to 2 tokens of a word.")
    for names in _pages(list(shown)):
        drawn = {name: shown[name] for name in names}
        yield image(figures.histograms(drawn, dict.fromkeys(names, "words"), "texts"), "Histograms of words")
    rows = []
    for name, held in shown.items():
        points = np.percentile(held["all"], [0, 5, 50, 95, 100])
        rows.append((name, store.schema.texts[name], f"{len(held['all']):,}", *(f"{v:.4g}" for v in points)))
    yield table(("field", "what", "texts", "shortest", "5%", "median", "95%", "longest"), rows, texts=2)


def _missing(store: StudyStore, found: Survey) -> Iterator[str]:
    parts = {(name if kind != "label" else f"{name} (label)"): held for (kind, name), held in found.present.items()}
    if not parts:
        return
    yield "<h2>What is missing</h2>"
    yield note(
        "A row is a pattern of parts that studies have together, most frequent first; dark: there, light: missing. "
        "Beside each part, the share of studies that has it."
    )
    kept = dict(list(parts.items())[: 2 * _PANELS])
    yield image(figures.missing(kept), "Which parts studies have")
    if len(kept) < len(parts):
        yield note(f"The first {len(kept)} of {len(parts)} parts are drawn.")


def _left_out(store: StudyStore, found: Survey) -> Iterator[str]:
    try:
        counts = _INPUTS.validate_json(store.beside("inputs.json") or b"{}")
    except ValidationError as error:
        raise UserError(f"{store.url}/inputs.json: is damaged; copy the store again or build it again") from error
    if not counts:
        return
    yield "<h2>What ingest took and left out</h2>"
    yield table(
        ("inputs", "found", "taken", "refused"),
        [(source, *(f"{held.get(k, 0):,}" for k in ("inputs", "taken", "refused"))) for source, held in counts.items()],
    )
    rejects = reject_counts(store)
    if not rejects:
        yield note("Nothing was refused.")
        return
    yield note("By reason; a value that was left out of an input that was taken names its column, label or text.")
    rows = [
        (source, part or "whole", reason.replace("_", " "), mend, f"{n:,}") for source, part, reason, mend, n in rejects
    ]
    yield table(("input", "part", "reason", "mend", "how many"), rows, texts=4)


def _ordered(splits: Iterable[str]) -> list[str]:
    """Train, validation and test first, in this order."""
    usual = ["train", "validation", "test"]
    return sorted(splits, key=lambda split: (usual.index(split) if split in usual else len(usual), split))


def _pages(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), _PANELS):
        yield names[start : start + _PANELS]
