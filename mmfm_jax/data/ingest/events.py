"""Columns and labels from events: what happened to a patient in a window around each study.

Shards are read in workers, filtered to the declared codes. Here events are dealt to the studies of their patients and
folded at once into what a column takes, in ways that do not depend on their order, so that the store does not depend on
which worker was first. Times serve to place events and go no further.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from mmfm_jax.data.deid.identifiers import capped_age, per_year
from mmfm_jax.data.ingest.dataset import Column, Dataset, Label
from mmfm_jax.data.ingest.event_fields import VALUES, EventSource, StudyTime
from mmfm_jax.data.ingest.inputs import Input
from mmfm_jax.data.ingest.ledger import Ledger
from mmfm_jax.data.ingest.pool import Runner
from mmfm_jax.data.ingest.progress import shown
from mmfm_jax.data.ingest.studies import Joined
from mmfm_jax.data.ingest.values import word
from mmfm_jax.data.moment import Moment, days_between, moment
from mmfm_jax.data.readers import fhir, meds
from mmfm_jax.data.readers.events import Event, EventFile, matches
from mmfm_jax.data.readers.fhir import People
from mmfm_jax.data.refuse import Refused

STUDY_TIME_TAGS = ("StudyDate", "StudyTime", "TimezoneOffsetFromUTC")
_RECORDS = "records"
"""In rejects, the part that stands for events of which no column is known."""


@dataclass(frozen=True)
class Reading:
    """A part of a file of events to read."""

    path: Path
    group: int
    """Row group of a MEDS shard."""
    wanted: tuple[str, ...]
    source: EventSource


def read(task: Reading) -> EventFile:
    """The wanted events of a part of a file. Raises Refused."""
    if task.source.format == "fhir":
        return fhir.read_events(task.path, task.wanted)
    return meds.read_events(task.path, task.group, task.wanted, task.source.unit_column, task.source.unit_from_code)


def add_events(
    dataset: Dataset,
    name: str,
    root: Path,
    files: list[Input],
    who: People | None,
    joined: list[Joined],
    ledger: Ledger,
    pool: Runner,
    progress: Progress,
) -> None:
    """Adds to the studies what the columns and labels of one source of events take.

    `who`: of FHIR, whom references mean. Each file is taken or refused as a whole, so a damaged part of a shard cannot
    pass for a patient without events.
    """
    source, label = dataset.events[name], f"events.{name}"
    windows = _Windows(dataset, name, joined, ledger)
    tasks, parts = [], Counter[int]()
    for at, one in enumerate(files):
        ledger.count(label, one.path)
        try:
            groups = meds.row_groups(root / one.path, source.unit_column) if source.format == "meds" else 1
        except Refused as why:
            ledger.refuse(label, one.path, why)
            continue
        parts[at] = groups
        tasks += [(at, Reading(root / one.path, group, windows.wanted, source)) for group in range(groups)]
        if not groups:
            ledger.refuse(label, one.path, Refused("empty", "it has no rows"))
    waiting: dict[int, list[EventFile | Refused]] = {}
    for index, result in shown(progress, "Reading events", read, [task for _, task in tasks], pool):
        at = tasks[index][0]
        waiting.setdefault(at, []).append(result)
        if len(waiting[at]) == parts[at]:
            held = waiting.pop(at)
            refused = [one for one in held if isinstance(one, Refused)]
            if refused:
                ledger.refuse(label, files[at].path, min(refused, key=lambda one: one.args))
            else:
                windows.add_file(files[at].path, [one for one in held if isinstance(one, EventFile)], who)
    windows.finish()


class _Windows:
    """What the fields of one source take for each study."""

    def __init__(self, dataset: Dataset, name: str, joined: list[Joined], ledger: Ledger):
        self._label, self._ledger, self._joined = f"events.{name}", ledger, joined
        self._fields = {key: f for key, f in dataset.of_events().items() if dataset.event_source(f) == name}
        self.wanted = tuple(sorted({code for field in self._fields.values() for code in field.codes}))
        self._of_patient: dict[str, list[tuple[int, Moment | None]]] = {}
        for at, study in enumerate(joined):
            time = _study_time(study, name, dataset, ledger)
            self._of_patient.setdefault(study.owner[0], []).append((at, time))
        self._seen: set[str] = set()
        self._taken: dict[tuple[int, str], _Taken] = {}
        self._asking: dict[tuple[str, ...], list[tuple[str, Column | Label]]] = {}
        """By the spellings of a code, the fields that count it."""

    def add_file(self, path: str, parts: list[EventFile], who: People | None) -> None:
        def patient_of(reference: str) -> str:
            return who.of(reference) if who is not None else reference

        patients = {patient_of(one) for part in parts for one in part.patients} & self._of_patient.keys()
        if not patients:
            self._ledger.refuse(self._label, path, Refused("unmatched", "none of its patients has a study"))
            return
        self._seen |= patients
        left_out: Counter[tuple[str, str]] = Counter()
        for part in parts:
            left_out.update({(_RECORDS, reason): n for reason, n in part.left_out.items()})
            for event in part.events:
                self._add(path, patient_of(event.patient), event, left_out)
        for (name, reason), n in left_out.items():
            self._ledger.leave_out(self._label, path, name, Refused(reason, f"{n:,} events"))

    def _add(self, path: str, patient: str, event: Event, left_out: Counter[tuple[str, str]]) -> None:
        if event.codes not in self._asking:
            self._asking[event.codes] = [
                (key, field)
                for key, field in self._fields.items()
                if any(matches(code, field.codes) for code in event.codes)
            ]
        for key, field in self._asking[event.codes]:
            name = key.partition(".")[2]
            reason, placed = "", []
            for at, time in self._of_patient.get(patient, ()):
                if field.static:
                    if event.time is None:
                        placed.append((at, 0.0))
                elif event.time is None:
                    reason = "no_time"
                elif time is not None:
                    assert field.window_days is not None
                    days = days_between(time, event.time)
                    if field.window_days[0] <= days <= field.window_days[1]:
                        placed.append((at, days))
            if placed:
                try:
                    value = _value(event, field)
                    for at, days in placed:
                        self._taken.setdefault((at, key), _Taken(field.take)).add(days, value, path)
                except Refused as why:
                    reason = why.reason
            if reason:
                left_out[name, reason] += 1

    def finish(self) -> None:
        """Gives the studies what was taken; of patients who were seen, no event is a count of 0 and a word for none."""
        ties: Counter[tuple[str, str]] = Counter()
        for patient, studies in self._of_patient.items():
            for at, time in studies:
                for key, field in self._fields.items():
                    taken = self._taken.get((at, key))
                    known = patient in self._seen and (field.static or time is not None)
                    if taken is None and not (known and field.take in ("count", "any")):
                        continue
                    try:
                        self._give(self._joined[at], key, field, taken)
                    except Refused:
                        assert taken is not None
                        ties[taken.path, key.partition(".")[2]] += 1
        for (path, name), n in ties.items():
            self._ledger.leave_out(self._label, path, name, Refused("same_time", f"in {n:,} studies"))

    def _give(self, study: Joined, key: str, field: Column | Label, taken: _Taken | None) -> None:
        part, _, name = key.partition(".")
        value = taken.value() if taken is not None else 0
        if isinstance(field, Label):
            assert part == "labels"
            study.labels[name] = int(taken is not None) if field.take == "any" else field.classes.index(str(value))
        elif field.take == "any":
            study.values[name] = field.vocabulary[int(taken is not None)]
        elif field.take == "since":
            of_year = per_year(field.unit)
            assert of_year is not None
            study.values[name] = capped_age(-float(value) / 365.2425 * of_year, field.unit)
        elif field.kind == "number":
            study.values[name] = capped_age(float(value), field.unit)
        else:
            study.values[name] = str(value)


class _Taken:
    """What a field takes of the events of one study, whatever their order."""

    def __init__(self, take: str):
        self._take, self._days = take, 0.0
        self._count = 0
        self._values: list = []
        self.path = ""
        """File of the event that decides; of several, the first by name."""

    def add(self, days: float, value: float | str | None, path: str) -> None:
        """`days`: from the study to the event."""
        self._count += 1
        if self._take in ("mean", "min", "max"):
            self._values.append(value)
            return
        if self._take in ("count", "any"):
            return
        later = days > self._days if self._take != "first" else days < self._days
        if self._count == 1 or later:
            self._days, self._values, self.path = days, [value], path
        elif days == self._days:
            self.path = min(self.path, path)
            if value not in self._values:
                self._values.append(value)

    def value(self) -> float | str:
        """Raises Refused when the last or first moment has several values."""
        if self._take in ("count", "any"):
            return self._count
        if self._take == "since":
            return self._days
        if self._take == "mean":
            return math.fsum(self._values) / len(self._values)  # the exact sum does not depend on the order
        if self._take in ("min", "max"):
            return (min if self._take == "min" else max)(self._values)
        if len(self._values) > 1:
            raise Refused("same_time", "several values of one time")
        return self._values[0]


def _value(event: Event, field: Column | Label) -> float | str | None:
    """What an event says to a field. Raises Refused."""
    if field.take not in VALUES:
        return None
    if isinstance(field, Label) or field.kind == "category":
        words = field.classes if isinstance(field, Label) else field.vocabulary
        said = [event.text] if event.text else list(event.codes)
        meant = next((one for one in said if field.values.get(one, one) in words), said[0])
        return word(meant, words, field.values)
    if event.value is None or not math.isfinite(event.value):
        raise Refused("not_a_number", "it has no number, or a bound")
    factor = field.units.get(event.unit, 1.0 if event.unit == field.unit else None)
    if factor is None:
        raise Refused("unknown_unit", "its unit is not declared")
    return event.value * factor


def _study_time(study: Joined, source: str, dataset: Dataset, ledger: Ledger) -> Moment | None:
    """When a study took place; None when it is not said, or said in several ways."""
    when = dataset.events[source].study_time
    if when is None:
        return None
    if when.image:
        series = study.images.get(when.image)
        return moment(_dicom_time(series.tags)) if series is not None else None
    return _table_time(study, source, when, dataset, ledger)


def _table_time(study: Joined, source: str, when: StudyTime, dataset: Dataset, ledger: Ledger) -> Moment | None:
    table, column = dataset.source("", when)
    found: set[Moment] = set()
    for row in study.rows:
        if row.table != table or not row.cells[column]:
            continue
        time = moment(row.cells[column], when.date_format)
        if time is None:
            why = Refused("not_a_date", "the time of the study is not a date to the day")
            ledger.leave_out(row.source, row.path, f"events.{source}", why, row.number)
        elif found and time not in found:
            why = Refused("contradiction", "an earlier row of the study has another time")
            ledger.leave_out(row.source, row.path, f"events.{source}", why, row.number)
            return None
        else:
            found.add(time)
    return next(iter(found), None)


def _dicom_time(tags: Mapping[str, str | None]) -> str:
    """Date, time of day and zone of a series in one spelling; empty when its files differ or lack the date."""
    day, clock, zone = ((tags.get(tag, "") or "").strip() for tag in STUDY_TIME_TAGS)
    clock = clock.replace(":", "")
    return day.replace(".", "") + (clock + zone if len(clock) >= 4 else "") if day else ""
