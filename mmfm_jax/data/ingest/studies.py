"""From rows, series and texts to studies: everything that one patient's one study has, joined by identifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date

from mmfm_jax.data.deid.identifiers import OLDEST_YEARS, Hider, reaches_past_89
from mmfm_jax.data.deid.scrub import spellings
from mmfm_jax.data.ingest.dataset import Column, Dataset, Label
from mmfm_jax.data.ingest.ledger import Ledger
from mmfm_jax.data.ingest.masks import MaskFile, StudyMask, together
from mmfm_jax.data.ingest.series import IMAGES, Owner, Series
from mmfm_jax.data.ingest.values import typed
from mmfm_jax.data.readers.table import Row
from mmfm_jax.data.refuse import Refused
from mmfm_jax.data.split import split_of
from mmfm_jax.errors import UserError

TEXTS = "texts"
_OLDEST_DAYS = OLDEST_YEARS * 365.2425
_MOST_SPLITS = 8
Value = float | str | date | int


@dataclass(frozen=True)
class TableRow:
    """A row of a table, with its identifiers."""

    table: str
    path: str
    number: int
    owner: Owner
    cells: Row

    @property
    def source(self) -> str:
        return f"tables.{self.table}"


@dataclass(frozen=True)
class TextFile:
    """A text file that text fields ask for."""

    path: str
    text: str
    owners: Mapping[str, Owner]
    """By text field."""


@dataclass(frozen=True)
class RawText:
    """A text before it is cleaned, and the input that it came from."""

    text: str
    source: str
    path: str
    row: int = 0


@dataclass
class Joined:
    """A study while it is put together; identifiers are in it, so never to be printed or stored."""

    owner: Owner
    split: str = ""
    images: dict[str, Series] = field(default_factory=dict)
    masks: dict[str, StudyMask] = field(default_factory=dict)
    texts: dict[str, list[RawText]] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    """Of columns, dates still as dates."""
    labels: dict[str, int] = field(default_factory=dict)
    rows: list[TableRow] = field(default_factory=list)


class Join:
    """Joins what the sources hold; what does not fit goes to the ledger."""

    def __init__(self, dataset: Dataset, hider: Hider, ledger: Ledger, known: dict[str, set[str]]):
        self._dataset, self._hider, self._ledger = dataset, hider, ledger
        self.known = known
        """Identifiers by patient, to be found in texts."""
        self._studies: dict[Owner, Joined] = {}
        self._of_patient: dict[str, list[Owner]] = {}

    def studies(
        self, rows: list[TableRow], series: list[Series], masks: list[MaskFile], texts: list[TextFile], key: str
    ) -> list[Joined]:
        """Every study that has something, with its split: patients in the order of their keyed hashes, and the studies
        of one as rows, then files by path, name them."""
        self._collect(rows, series, texts)
        for row in rows:
            self._add_row(row)
        self._add_series(series)
        self._add_masks(masks)
        for text in texts:
            self._add_text(text)
        self._tags()
        self._finish_dates()
        self._deal(rows, key)
        hidden = {patient: self._hider.patient(patient) for patient, _ in self._studies}
        return sorted(self._studies.values(), key=lambda study: hidden[study.owner[0]])

    def _collect(self, rows: list[TableRow], series: list[Series], texts: list[TextFile]) -> None:
        """Finds the studies of each patient: those that some source names, else one without a name."""
        named: dict[str, dict[str, None]] = {}
        owners = [row.owner for row in rows if not self._is_of_people(row)] + [one.owner for one in series]
        owners += [owner for text in texts for owner in text.owners.values()]
        for patient, study in owners:
            held = named.setdefault(patient, {})
            if study:
                held[study] = None
            self.known.setdefault(patient, set()).update(spellings(patient, False), spellings(study, False))
        for patient, studies in named.items():
            self._of_patient[patient] = [(patient, study) for study in studies] or [(patient, "")]

    def _study(self, owner: Owner) -> Joined:
        """The study of an image or a text. Raises Refused when its patient has several and the input names none."""
        owner = self._owner(owner)
        return self._studies.setdefault(owner, Joined(owner))

    def _owner(self, owner: Owner) -> Owner:
        """With the study, where the input names none and its patient has one. Raises Refused when it has several."""
        studies = self._of_patient.get(owner[0], [])
        if owner[1] or not studies:
            return owner
        if len(studies) > 1:
            raise Refused("no_study", f"its patient has {len(studies)} studies and it names none")
        return studies[0]

    # ------------------------------------------------------------ tables

    def _is_of_people(self, row: TableRow) -> bool:
        """A Patient resource says who someone is, and makes no study."""
        return self._dataset.tables[row.table].resource == "Patient"

    def _add_row(self, row: TableRow) -> None:
        """A row that names no study holds for every study of its patient."""
        if row.owner[0] not in self._of_patient:
            self._ledger.refuse(row.source, row.path, Refused("unmatched", "its patient has no study"), row.number)
            return
        owners = [row.owner] if row.owner[1] else self._of_patient[row.owner[0]]
        known = self.known[row.owner[0]]
        for column in self._dataset.tables[row.table].identifiers:
            cell = row.cells[column]
            known |= spellings(cell, person=not any(c.isdigit() for c in cell))
        for owner in owners:
            study = self._studies.setdefault(owner, Joined(owner))
            study.rows.append(row)
            for name, column in self._dataset.columns.items():
                if column.from_table:
                    self._add_value(study.values, name, column, row)
            for name, label in self._dataset.labels.items():
                if label.from_table:
                    self._add_value(study.labels, name, label, row)
            for name, text in self._dataset.texts.items():
                table, column = self._dataset.source(name, text)
                if not text.files and table == row.table and row.cells[column]:
                    raw = RawText(row.cells[column], row.source, row.path, row.number)
                    study.texts.setdefault(name, []).append(raw)

    def _add_value(self, into: dict, name: str, field: Column | Label, row: TableRow) -> None:
        table, column = self._dataset.source(name, field)
        if table != row.table or row.cells[column] in self._dataset.tables[table].missing:
            return
        try:
            value = typed(row.cells[column], field)
            if into.setdefault(name, value) != value:
                raise Refused("contradiction", "an earlier row of the study has another value")
        except Refused as why:
            self._ledger.leave_out(row.source, row.path, name, why, row.number)

    # ------------------------------------------------------------ images and texts

    def _add_series(self, series: list[Series]) -> None:
        fitting: dict[tuple[Owner, str], list[Series]] = {}
        for one in series:
            try:
                fitting.setdefault((self._study(one.owner).owner, one.role), []).append(one)
            except Refused as why:
                one.refuse(self._ledger, why)
        for (owner, role), held in fitting.items():
            held.sort(key=lambda one: (-one.size, one.inputs[0].path))
            if len(held) > 1 and self._dataset.images[role].several == "refuse":
                for one in held:
                    one.refuse(self._ledger, Refused("several_series", f"{len(held)} series of its study fit the role"))
                continue
            for other in held[1:]:
                other.refuse(self._ledger, Refused("another_series", "a larger series of its study was taken"))
            self._studies[owner].images[role] = held[0]

    def _add_masks(self, masks: list[MaskFile]) -> None:
        """Of each study and mask the files that are of the image taken."""
        fitting: dict[tuple[Owner, str], list[MaskFile]] = {}
        for one in masks:
            try:
                owner = self._owner(one.owner)
                held = self._studies.get(owner)
                one.check(held.images.get(self._dataset.masks[one.name].image) if held else None)
                fitting.setdefault((owner, one.name), []).append(one)
            except Refused as why:
                one.refuse(self._ledger, why)
        for (owner, name), held in fitting.items():
            try:
                self._studies[owner].masks[name] = together(name, held)
            except Refused as why:
                for one in held:
                    one.refuse(self._ledger, why)

    def _add_text(self, file: TextFile) -> None:
        refused = []
        for name, owner in file.owners.items():
            try:
                self._study(owner).texts.setdefault(name, []).append(RawText(file.text, TEXTS, file.path))
            except Refused as why:
                refused.append((name, why))
        for name, why in refused:
            if len(refused) == len(file.owners):
                self._ledger.refuse(TEXTS, file.path, why)
            else:
                self._ledger.leave_out(TEXTS, file.path, name, why)

    def _tags(self) -> None:
        """Values of declared DICOM tags, from the series that were taken."""
        for study in self._studies.values():
            for name, column in self._dataset.columns.items():
                series = study.images.get(column.image) if column.tag else None
                if series is None or column.tag not in series.tags:
                    continue
                text = series.tags[column.tag]
                try:
                    if text is None:
                        raise Refused("differs_in_series", "the files of the series have several values")
                    study.values[name] = typed(text, column)
                except Refused as why:
                    self._ledger.leave_out(IMAGES, series.inputs[0].path, name, why)

    # ------------------------------------------------------------ dates and splits

    def _finish_dates(self) -> None:
        """Dates become days after another date, or days since 1970 after the patient's shift."""
        columns = {name: column for name, column in self._dataset.columns.items() if column.kind == "date"}
        dates = [v for study in self._studies.values() for n, v in study.values.items() if n in columns]
        newest = max((d for d in dates if isinstance(d, date)), default=date.min)
        for study in self._studies.values():
            found = {name: study.values.pop(name) for name in columns if name in study.values}
            for name, day in found.items():
                assert isinstance(day, date)
                try:
                    study.values[name] = self._days(study.owner[0], day, columns[name], found, newest)
                except Refused as why:
                    for row in study.rows[:1]:
                        self._ledger.leave_out(row.source, row.path, name, why, row.number)
                    if columns[name].tag:
                        path = study.images[columns[name].image].inputs[0].path
                        self._ledger.leave_out(IMAGES, path, name, why)

    def _days(self, patient: str, day: date, column: Column, found: Mapping[str, Value], newest: date) -> float:
        if not column.relative_to:
            if reaches_past_89(day, newest):
                raise Refused("over_89", "it reaches back 90 years or more before the newest date")
            try:
                return self._hider.shifted(patient, day)
            except OverflowError:
                raise Refused("not_a_date", "the date is before the calendar begins") from None
        other = found.get(column.relative_to)
        if not isinstance(other, date):
            raise Refused("not_a_date", "the date that it is relative to is missing")
        return float(min(_OLDEST_DAYS, max(-_OLDEST_DAYS, (day - other).days)))

    def _deal(self, rows: list[TableRow], key: str) -> None:
        """Gives each patient a split; one whose split cannot be told is left out with all that it has."""
        split = self._dataset.split
        if not split.column:
            for study in self._studies.values():
                study.split = split_of(study.owner[0], key, split.fractions)
            return
        table, column = self._dataset.source("split", split)
        said: dict[str, set[str]] = {}
        for row in rows:
            if row.table == table and row.cells[column]:
                said.setdefault(row.owner[0], set()).add(row.cells[column])
        if len(set().union(*said.values())) > _MOST_SPLITS:
            raise UserError(
                f"split.column: {column} holds more than {_MOST_SPLITS} different values; name another column"
            )
        for owner, study in list(self._studies.items()):
            names = said.get(owner[0], set())
            name = next(iter(names), "")
            if len(names) == 1 and name.isascii() and name.replace("_", "").isalnum() and len(name) <= 32:
                study.split = name
            else:
                self._refuse(study, Refused("bad_split", f"its patient is given {len(names)} splits"))
                del self._studies[owner]

    def _refuse(self, study: Joined, why: Refused) -> None:
        for row in study.rows:
            self._ledger.refuse(row.source, row.path, why, row.number)
        for held in (*study.images.values(), *study.masks.values()):
            held.refuse(self._ledger, why)
        for texts in study.texts.values():
            for text in texts:
                self._ledger.refuse(text.source, text.path, why, text.row)
