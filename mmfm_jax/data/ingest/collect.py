"""Everything that the description points at: rows of tables, files of images and texts, each counted in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmfm_jax.data.deid.scrub import spellings
from mmfm_jax.data.ingest.convert import Look
from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.data.ingest.events import STUDY_TIME_TAGS
from mmfm_jax.data.ingest.inputs import Files, Input, look_at, pattern
from mmfm_jax.data.ingest.ledger import Ledger
from mmfm_jax.data.ingest.patterns import fullmatch
from mmfm_jax.data.ingest.series import IMAGES, Candidate, Owner, owner_in_path
from mmfm_jax.data.ingest.studies import TEXTS, TableRow, TextFile
from mmfm_jax.data.readers.fhir import People, people, rows
from mmfm_jax.data.readers.table import Row, read_table
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

FOLDERS = "folders"
_TEXT_BYTES = 16 * 2**20


class Collected:
    """Inputs as they were found; `look` adds what is in the image files."""

    def __init__(self, dataset: Dataset, root: Path, ledger: Ledger):
        self._dataset, self._root, self._ledger = dataset, root, ledger
        self.rows: list[TableRow] = []
        self.texts: list[TextFile] = []
        self.candidates: list[Candidate] = []
        self.states: list[str] = []
        """Name, size and time of change of every input."""
        self.images: dict[str, tuple[Input, dict[str, Owner | None]]] = {}
        """By path: the file, and the roles and masks that ask for it with the owner that a table names."""
        self.events: dict[str, list[Input]] = {}
        """By source of events: its files that may be opened."""
        self._people: dict[tuple[str, ...], People] = {}

    def people(self, held: list[Input], system: str) -> People:
        """Who the Patient resources of FHIR files are; read once for each set of files."""
        key = (system, *(one.path for one in held))
        if key not in self._people:
            self._people[key] = people([self._root / one.path for one in held], system)
        return self._people[key]

    def named_in_fhir(self) -> dict[str, set[str]]:
        """By patient, the spellings of names and contacts in FHIR resources, to be found in texts."""
        found: dict[str, set[str]] = {}
        for who in self._people.values():
            for held, person in ((who.names, True), (who.contacts, False)):
                for patient, words in held.items():
                    found.setdefault(patient, set()).update(s for word in words for s in spellings(word, person))
        return found

    def look(self, voxel_limit: int, shown: Callable[[list[Look]], Iterator[tuple[int, Any]]]) -> None:
        """Looks into each image file in a worker; those of no use are refused in the ledger."""
        held = list(self.images.values())
        tags = tuple(sorted({c.tag for c in self._dataset.columns.values() if c.tag} | self._time_tags()))
        tasks = [Look(self._root / one.path, tags, voxel_limit) for one, _ in held]
        results: dict[int, tuple] = {}
        for index, result in shown(tasks):
            if isinstance(result, Refused):
                self._ledger.refuse(IMAGES, held[index][0].path, result)
            else:
                results[index] = result
        self.candidates = [Candidate(*held[index], *results[index]) for index in sorted(results)]

    def _time_tags(self) -> set[str]:
        times = (source.study_time for source in self._dataset.events.values())
        return set(STUDY_TIME_TAGS) if any(time is not None and time.image for time in times) else set()


def collect(dataset: Dataset, described_in: Path, root: Path, ledger: Ledger) -> Collected:
    """Reads the tables and texts, and lists the images. Raises UserError for a table that cannot be read."""
    found = Collected(dataset, root, ledger)
    files = Files(root)
    for name, table in dataset.tables.items():
        if table.resource:
            _resources(dataset, name, described_in, found, files, ledger)
        else:
            _table(dataset, name, described_in, found, files, ledger)
    for name, source in dataset.events.items():
        found.events[name] = _matching(source.files, f"events.{name}", found, files, ledger)
        if source.format == "fhir":
            found.people(found.events[name], source.patient_system)
    for name, role in [*dataset.images.items(), *dataset.masks.items()]:
        patterns = [pattern(glob) for glob in role.files]
        for path, one in files.by_path.items():
            if any(fullmatch(p, path) for p in patterns):
                _ask(found, one, name, None, ledger)
    _texts(dataset, found, files, ledger)
    for path, one in files.by_path.items():  # a folder that is not entered may hold inputs: say so
        if one.refused is not None and (root / path).is_dir():
            ledger.refuse(FOLDERS, path, one.refused)
    return found


def _ask(found: Collected, one: Input, role: str, owner: Owner | None, ledger: Ledger) -> None:
    """Notes that a role or mask asks for a file."""
    if one.path not in found.images:
        ledger.count(IMAGES, one.path)
        found.states.append(one.state)
    if one.refused is not None:
        ledger.refuse(IMAGES, one.path, one.refused)
        return
    found.images.setdefault(one.path, (one, {}))[1][role] = owner


def _table(dataset: Dataset, name: str, described_in: Path, found: Collected, files: Files, ledger: Ledger) -> None:
    """Rows of a table, and the image files that its cells name."""
    table, source = dataset.tables[name], f"tables.{name}"
    one = look_at(files.root, table.file)
    words = f"{described_in}: tables.{name}: {table.file}"
    if one.refused is not None:
        raise UserError(f"{words}: {one.refused.detail}; mend the path")
    found.states.append(one.state)
    asking = [*dataset.images.items(), *dataset.masks.items()]
    roles = {role: spec.column for role, spec in asking if spec.table == name}
    for number, row in read_table(files.root / table.file, words, _columns(dataset, name), table.encoding):
        row = _add_row(dataset, name, table.file, number, row, found, ledger)
        if row is None:
            continue
        owner = found.rows[-1].owner
        for role, column in roles.items():
            if row[column]:
                for held in files.at(row[column].removeprefix("./")):
                    why = held.refused
                    if held.path in found.images and found.images[held.path][1].get(role, owner) != owner:
                        why = Refused("contradiction", "an earlier row names the file for another patient or study")
                    if why is not None:
                        ledger.leave_out(source, table.file, role, why, number)
                    else:
                        _ask(found, held, role, owner, ledger)


def _add_row(
    dataset: Dataset, name: str, path: str, number: int, row: Row | Refused, found: Collected, ledger: Ledger
) -> Row | None:
    """Counts a row and keeps it with its owner; None when it is refused."""
    table, source = dataset.tables[name], f"tables.{name}"
    ledger.count(source, path, number)
    if isinstance(row, Refused):
        ledger.refuse(source, path, row, number)
        return None
    row = {column: "" if cell in table.missing else cell for column, cell in row.items()}
    owner = (row[table.patient], row[table.study] if table.study else "")
    if not owner[0] or (table.study and not owner[1]):
        lacking = "study" if owner[0] else "patient"
        ledger.refuse(source, path, Refused(f"no_{lacking}", f"its {lacking} is missing"), number)
        return None
    found.rows.append(TableRow(name, path, number, owner, row))
    return row


def _resources(dataset: Dataset, name: str, described_in: Path, found: Collected, files: Files, ledger: Ledger) -> None:
    """FHIR resources of one type as rows; a file that cannot be read counts as one refused."""
    table, source = dataset.tables[name], f"tables.{name}"
    held = _matching(table.files, source, found, files, ledger)
    if not held:
        raise UserError(f"{described_in}: tables.{name}: no file that may be read matches files; mend the patterns")
    who = found.people(held, table.patient_system)
    for one in held:
        try:
            for number, row in enumerate(rows(files.root / one.path, table.resource, who, table.study_system), 1):
                _add_row(dataset, name, one.path, number, row, found, ledger)
        except Refused as why:
            ledger.refuse(source, one.path, why)


def _matching(globs: Iterable[str], source: str, found: Collected, files: Files, ledger: Ledger) -> list[Input]:
    """The files that match any of the patterns and may be opened; the others are refused."""
    patterns, held = [pattern(glob) for glob in globs], []
    for path, one in files.by_path.items():
        if any(fullmatch(p, path) for p in patterns):
            found.states.append(one.state)
            if one.refused is not None:
                ledger.refuse(source, path, one.refused)
            else:
                held.append(one)
    return held


def _columns(dataset: Dataset, name: str) -> list[str]:
    """Columns of a table that anything is read from."""
    table = dataset.tables[name]
    columns = [table.patient, *([table.study] if table.study else []), *table.identifiers]
    columns += [role.column for role in (*dataset.images.values(), *dataset.masks.values()) if role.table == name]
    fields = [*dataset.columns.items(), *dataset.labels.items(), *dataset.texts.items()]
    if dataset.split.column:
        fields.append(("split", dataset.split))
    fields += [("", source.study_time) for source in dataset.events.values() if source.study_time is not None]
    for field_name, field in fields:
        if getattr(field, "from_table", True) and not getattr(field, "files", ()) and not getattr(field, "image", ""):
            held_in, column = dataset.source(field_name, field)
            if held_in == name:
                columns.append(column)
    return columns


def _texts(dataset: Dataset, found: Collected, files: Files, ledger: Ledger) -> None:
    asking = {name: [pattern(glob) for glob in text.files] for name, text in dataset.texts.items() if text.files}
    for path, one in files.by_path.items():
        names = [name for name, patterns in asking.items() if any(fullmatch(p, path) for p in patterns)]
        if not names:
            continue
        ledger.count(TEXTS, path)
        found.states.append(one.state)
        try:
            if one.refused is not None:
                raise one.refused
            owners = {name: owner_in_path(dataset.texts[name].path, path) for name in names}
            found.texts.append(TextFile(path, _read(files.root / path, one.size), owners))
        except Refused as why:
            ledger.refuse(TEXTS, path, why)


def _read(path: Path, size: int) -> str:
    if size > _TEXT_BYTES:
        raise Refused("too_large", f"it has {size:,} bytes")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused("not_utf8", "it is not UTF-8 text") from None
    except OSError:
        raise Refused("unreadable", "it cannot be read") from None
    if not text.strip():
        raise Refused("empty", "it is an empty text")
    return text
