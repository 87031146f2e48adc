"""`mmfm ingest`: from raw exports to a store, de-identified, with every input accounted for.

In order: find the files, read the tables, look at each file, join all into studies, convert series in worker processes,
clean texts, write the store. Converted voxels wait in a work folder beside the store, under keyed hashes, so a run that
was killed goes on from there; the store itself is written in one go from what is there, and so is the same, byte for
byte, however often the run was killed. It is a function of the description, the key and the inputs (their names, sizes
and times of change).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import Progress

from mmfm_jax.data.deid import presidio
from mmfm_jax.data.deid.identifiers import Hider
from mmfm_jax.data.ingest.collect import collect
from mmfm_jax.data.ingest.convert import Cleaning, clean, look
from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.data.ingest.events import add_events
from mmfm_jax.data.ingest.images import VERSION, Images
from mmfm_jax.data.ingest.inputs import root_of
from mmfm_jax.data.ingest.ledger import Counts, Ledger
from mmfm_jax.data.ingest.load import load_dataset, read_key
from mmfm_jax.data.ingest.masks import apart
from mmfm_jax.data.ingest.place import already, check_old, work_folder, write
from mmfm_jax.data.ingest.pool import Limits, Pool, Runner
from mmfm_jax.data.ingest.progress import shown
from mmfm_jax.data.ingest.ray_pool import RayPool
from mmfm_jax.data.ingest.series import group
from mmfm_jax.data.ingest.studies import TEXTS, Join, Joined, RawText
from mmfm_jax.data.refuse import Refused, Reject, from_parquet, to_parquet
from mmfm_jax.data.split import fingerprint
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.study import ColumnSpec, ImageSpec, LabelSpec, MaskSpec, Schema
from mmfm_jax.errors import UserError
from mmfm_jax.screen import progress_on

_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Outcome:
    """What became of the inputs."""

    counts: dict[str, Counts]
    rejects: list[Reject]
    built: bool
    """False when the store was already there, whole and of the same inputs."""


def ingest(
    described_in: Path,
    out: str,
    limits: Limits,
    *,
    append: bool = False,
    work: Path | None = None,
    ray: bool = False,
    console: Console,
    key: str = "",
    about: Mapping[str, str] | None = None,
    whole: bool = False,
) -> Outcome:
    """Builds the store at `out` (a path or TensorStore URL) that a description asks for, or adds new inputs to it.

    `work`: folder for converted voxels, as large as the store uncompressed; beside the store when it is a path.
    `ray`: files are read on the Ray cluster that runs, and inputs and `work` must be at one path on all its machines.
    `key`: for public data, instead of the secret that the description names. `about`: further words on the source.
    `whole`: no store rather than one that leaves an input out.
    Raises UserError for a description or table that is wrong, for a place that holds something else, and when no input
    at all can be taken.
    """
    dataset = load_dataset(described_in)
    key = key or read_key(dataset, described_in)
    hider, root = Hider(key), root_of(dataset, described_in)
    for text in dataset.texts.values():
        if text.presidio:
            presidio.check(text.presidio)
    ledger = Ledger(hider)
    found = collect(dataset, described_in, root, ledger)
    source = source_of(dataset, key) | dict(about or {})
    source["inputs"] = hider.state("\0".join([str(VERSION), *sorted(found.states)]))
    old = already(out, source, append)
    if old is not None and old.file.source["inputs"] == source["inputs"]:
        return _of_store(old)
    work = work_folder(out, work)
    try:
        with progress_on(console) as progress, (RayPool if ray else Pool)(limits) as pool:
            found.look(limits.voxels, lambda tasks: shown(progress, "Looking at files", look, tasks, pool))
            candidates, masks, known = apart(dataset, found.candidates, ledger)
            for patient, names in found.named_in_fhir().items():
                known.setdefault(patient, set()).update(names)
            series = group(dataset, candidates, ledger, known)
            joined = Join(dataset, hider, ledger, known).studies(found.rows, series, masks, found.texts, key)
            for name, events in dataset.events.items():
                files = found.events[name]
                who = found.people(files, events.patient_system) if events.format == "fhir" else None
                add_events(dataset, name, root, files, who, joined, ledger, pool, progress)
            images = Images(dataset, hider, root, work, old)
            images.convert(joined, ledger, pool, progress)
            texts = _clean(dataset, joined, known, ledger, pool, progress)
            studies = _kept(joined, images, texts, ledger)
            if not studies:
                raise UserError(f"{described_in}: none of the inputs can be taken: {_why(ledger)}")
            if whole and ledger.rejects:
                raise UserError(f"{out}: cannot be built whole: {_why(ledger)}; make room in memory and try again")
            if old is not None:
                check_old(old, {hider.patient(one.owner[0]): one.split for one, _ in studies}, out)
            beside = {
                "rejects.parquet": to_parquet(ledger.rejects),
                "inputs.json": json.dumps({s: asdict(c) for s, c in ledger.counts().items()}, indent=1).encode(),
                "series.parquet": images.table([one for one, _ in studies]),
            }
            counted = progress.track(studies, description="Writing the store")
            made = (images.study(one, held, hider) for one, held in counted)
            write(out, old, schema_of(dataset), made, dataset.description, source, beside)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        with suppress(OSError):  # what was converted stays for the next run
            work.rmdir()
    return Outcome(ledger.counts(), ledger.rejects, True)


def source_of(dataset: Dataset, key: str) -> dict[str, str]:
    """What a store says of how it was made, whatever its inputs."""
    described = Hider(key).state(dataset.model_dump_json(exclude={"key", "root"}))
    return {"builder": "ingest", "split_key_fingerprint": fingerprint(key), "described": described}


def schema_of(dataset: Dataset) -> Schema:
    """What the store declares; a date is a number of days."""
    columns = {}
    for name, column in dataset.columns.items():
        if column.kind == "category":
            columns[name] = ColumnSpec(kind="category", vocabulary=column.vocabulary, description=column.description)
        else:
            unit = "days" if column.kind == "date" else column.unit
            columns[name] = ColumnSpec(kind="number", unit=unit, description=column.description)
    return Schema(
        images={
            name: ImageSpec(dtype=role.dtype, shape=role.shape, channels=role.channels, description=role.description)
            for name, role in dataset.images.items()
        },
        texts={name: text.description for name, text in dataset.texts.items()},
        columns=columns,
        masks={
            name: MaskSpec(image=mask.image, classes=mask.classes, description=mask.description)
            for name, mask in dataset.masks.items()
        },
        labels={
            name: LabelSpec(classes=one.classes, description=one.description, from_text=one.from_text)
            for name, one in dataset.labels.items()
        },
    )


# ---------------------------------------------------------------- texts


def _clean(
    dataset: Dataset,
    joined: list[Joined],
    known: Mapping[str, set[str]],
    ledger: Ledger,
    pool: Runner,
    progress: Progress,
) -> list[dict[str, tuple[str, ...]]]:
    """The texts of each study by field, cut to sections and scrubbed; none with a text that was refused."""
    work: list[tuple[int, str, list[RawText], Cleaning]] = []
    for at, study in enumerate(joined):
        for name in (name for name in dataset.texts if name in study.texts):
            field, raw = dataset.texts[name], study.texts[name]
            cleaning = Cleaning(
                tuple(one.text for one in raw),
                field.section,
                field.scrub,
                field.presidio,
                frozenset(known[study.owner[0]]),
            )
            work.append((at, name, raw, cleaning))
    batches = [work[i : i + _TEXTS_AT_ONCE] for i in range(0, len(work), _TEXTS_AT_ONCE)]
    out: list[dict[str, tuple[str, ...]]] = [{} for _ in joined]
    singles = []
    good: set[str] = set()
    bad: list[tuple[RawText, str, Refused]] = []

    def keep(batch: list, results: list[list[str | Refused]]) -> None:
        for (at, name, raw, _), texts in zip(batch, results):
            for one, text in zip(raw, texts):
                if isinstance(text, Refused):
                    bad.append((one, name, text))
                else:
                    good.add(one.path)
            if kept := tuple(text for text in texts if isinstance(text, str)):
                out[at][name] = kept

    for index, result in shown(progress, "Cleaning texts", clean, [[w[3] for w in b] for b in batches], pool):
        if isinstance(result, Refused):  # one text spoils a batch: find out which
            singles += [[one] for one in batches[index]]
        else:
            keep(batches[index], result)
    for index, result in pool.run(clean, [[w[3] for w in b] for b in singles]):
        keep(singles[index], [[result] * len(singles[index][0][2])] if isinstance(result, Refused) else result)
    for one, name, why in bad:
        if one.source == TEXTS and one.path not in good:
            ledger.refuse(TEXTS, one.path, why)
        else:
            ledger.leave_out(one.source, one.path, name, why, one.row)
    return out


def _kept(
    joined: list[Joined], images: Images, texts: list[dict[str, tuple[str, ...]]], ledger: Ledger
) -> list[tuple[Joined, dict[str, tuple[str, ...]]]]:
    """Studies that have anything left; rows and text files of which nothing was taken are refused."""
    kept, used, seen = [], set(), set()
    for study, held in zip(joined, texts):
        inputs = {(row.source, row.path, row.number) for row in study.rows}
        inputs |= {(one.source, one.path, one.row) for raw in study.texts.values() for one in raw}
        seen |= inputs
        if study.images or held or study.values or study.labels:
            kept.append((study, held))
            used |= inputs
    for source, path, row in seen - used:
        ledger.refuse(source, path, Refused("empty_study", "nothing of its study was left"), row)
    return kept


def _of_store(store: StudyStore) -> Outcome:
    try:
        counts = TypeAdapter(dict[str, Counts]).validate_json(store.beside("inputs.json") or b"{}")
        return Outcome(counts, from_parquet(store.beside("rejects.parquet") or to_parquet([])), False)
    except ValueError as error:
        raise UserError(f"{store.url}: its account of inputs is damaged; build it again at another place") from error


def _why(ledger: Ledger) -> str:
    reasons = sorted({reject.reason for reject in ledger.rejects})
    total = sum(counts.inputs for counts in ledger.counts().values())
    refused = sum(counts.refused for counts in ledger.counts().values())
    found = f"{total} were found, {refused} refused for {', '.join(reasons)}"
    return found if total else "no file matches a pattern"
