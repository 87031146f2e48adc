"""From files to series: which belong together, which role they play, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmfm_jax.data.ingest import patterns
from mmfm_jax.data.ingest.dataset import Dataset, Files, ImageRole
from mmfm_jax.data.ingest.inputs import Input
from mmfm_jax.data.ingest.ledger import Ledger
from mmfm_jax.data.ingest.suspicions import suspicions
from mmfm_jax.data.readers import DICOM
from mmfm_jax.data.readers.dicom import Header
from mmfm_jax.data.refuse import Refused

Owner = tuple[str, str]
"""Identifiers of patient and study; an empty study where the source names none."""
IMAGES = "images"

_SUSPECT = {
    "burned_in_text": "its header or modality suggests text burned into the picture",
    "face": "it may show a recognisable face, or does not say which part of the body it shows",
}


@dataclass(frozen=True)
class Candidate:
    """A file that image roles ask for, and what was seen in it."""

    input: Input
    roles: Mapping[str, Owner | None]
    """Image roles and masks whose pattern or table has the file, with the owner where the table names one."""
    kind: str
    header: Header | None


@dataclass(frozen=True)
class Series:
    """Files that make one image."""

    role: str
    kind: str
    inputs: tuple[Input, ...]
    owner: Owner
    size: int
    """Voxels that headers announce, or bytes: to choose the largest of one role."""
    tags: Mapping[str, str | None]
    """Declared tags; None where the files of the series differ."""
    uids: frozenset[str] = frozenset()
    """Of a DICOM series and its instances, by which masks refer to it."""

    def refuse(self, ledger: Ledger, why: Refused) -> None:
        for file in self.inputs:
            ledger.refuse(IMAGES, file.path, why)


def group(dataset: Dataset, candidates: list[Candidate], ledger: Ledger, known: dict[str, set[str]]) -> list[Series]:
    """The series that the candidates make. Adds to `known`, by patient, the identifiers that headers name.

    What belongs to no series is refused in the ledger.
    """
    groups: dict[tuple[str, str], dict[Owner, list[Candidate]]] = {}
    for candidate in candidates:
        try:
            role = _role(dataset, candidate)
            owner = owner_of(role, dataset.images[role], dataset.images[role].study_tag, candidate)
            if not owner[0]:
                raise Refused("no_patient", "it names no patient")
        except Refused as why:
            ledger.refuse(IMAGES, candidate.input.path, why)
            continue
        if candidate.header is not None:
            known.setdefault(owner[0], set()).update(candidate.header.names)
        series = candidate.header.series if candidate.header is not None else ""
        by_owner = groups.setdefault((role, series or f"/{candidate.input.path}"), {})
        by_owner.setdefault(owner, []).append(candidate)
    made = []
    for (role, _), by_owner in groups.items():
        for owner, held in by_owner.items():
            try:
                # Paths and tables decide whose a file is, but headers of one series must agree.
                if len(by_owner) > 1 and not dataset.images[role].path and not dataset.images[role].table:
                    raise Refused("mixed_series", "its files name several patients or studies")
                made.append(_series(role, dataset.images[role], owner, held))
            except Refused as why:
                for candidate in held:
                    ledger.refuse(IMAGES, candidate.input.path, why)
    return made


def _series(name: str, role: ImageRole, owner: Owner, held: list[Candidate]) -> Series:
    for candidate in held:
        for suspicion in suspicions(candidate.header, role.modality, role.body_part):
            if suspicion not in role.allow:
                raise Refused(suspicion, _SUSPECT[suspicion])
    headers = [candidate.header for candidate in held if candidate.header is not None]
    tags: dict[str, str | None] = {}
    for tag in sorted({tag for header in headers for tag in header.tags}):
        values = {header.tags.get(tag) for header in headers}
        tags[tag] = values.pop() if len(values) == 1 else None
    size = sum(header.voxels for header in headers) if headers else sum(c.input.size for c in held)
    uids = frozenset(uid for header in headers for uid in (header.series, header.instance) if uid)
    return Series(name, held[0].kind, tuple(c.input for c in held), owner, size, tags, uids)


def _role(dataset: Dataset, candidate: Candidate) -> str:
    takes = [name for name in candidate.roles if name in dataset.masks or _fits(dataset.images[name], candidate.header)]
    if candidate.header is not None:  # which says that it is an image
        takes = [name for name in takes if name in dataset.images]
    if len(takes) != 1:
        asking = len(candidate.roles)
        reason = "several_roles" if takes else "no_role"
        raise Refused(reason, f"{len(takes)} of the {asking} roles that ask for the file take it")
    return takes[0]


def _fits(role: ImageRole, header: Header | None) -> bool:
    if header is None:
        return True
    if role.modality and header.modality != role.modality.upper():
        return False
    return not role.series_description or patterns.search(role.series_description, header.description) is not None


def owner_of(name: str, role: Files, study_tag: str, candidate: Candidate) -> Owner:
    """Whose a file is, as the table that names it says, its path, or its header. Raises Refused."""
    named = candidate.roles[name]
    if named is not None:
        return named
    if role.path:
        return owner_in_path(role.path, candidate.input.path)
    if candidate.kind == DICOM and candidate.header is not None:
        return candidate.header.patient, candidate.header.studies[study_tag]
    raise Refused("no_patient", "its format names no patient, and there is no `path` pattern for it")


def owner_in_path(pattern: str, path: str) -> Owner:
    """Patient and study in a path. Raises Refused when the pattern does not match the whole path."""
    found = patterns.fullmatch(pattern, path)
    if found is None or not found.group("patient"):
        raise Refused("no_patient", "its path does not match the `path` pattern")
    return found.group("patient"), (found.groupdict().get("study") or "")
