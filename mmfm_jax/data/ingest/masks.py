"""Which files are masks, and of which image of which study each is."""

from __future__ import annotations

from dataclasses import dataclass

from mmfm_jax.data.ingest import patterns
from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.data.ingest.inputs import Input
from mmfm_jax.data.ingest.ledger import Ledger
from mmfm_jax.data.ingest.series import IMAGES, Candidate, Owner, Series, owner_of
from mmfm_jax.data.refuse import Refused


@dataclass(frozen=True)
class MaskFile:
    """A file for one of the masks that it is asked for."""

    name: str
    kind: str
    input: Input
    owner: Owner
    refers: frozenset[str] | None
    """UIDs of the series, or of instances, that a DICOM object is of; None for other formats, which name none."""
    segment: str = ""
    """The one segment that it holds, where its path says so."""

    def check(self, image: Series | None) -> None:
        """Raises Refused unless it is of this image of its study."""
        if image is None:
            raise Refused("image_missing", "no image of its role was taken for its study")
        if self.refers is None:
            return
        if not self.refers:
            raise Refused("no_reference", "it does not say which series it is of")
        if not self.refers & image.uids:
            raise Refused("other_image", "it is of another series than the one that was taken")

    def refuse(self, ledger: Ledger, why: Refused) -> None:
        ledger.refuse_part(IMAGES, self.input.path, self.name, why)


@dataclass(frozen=True)
class StudyMask:
    """A mask of a study: one file, or a file for each segment."""

    name: str
    files: tuple[MaskFile, ...]

    def refuse(self, ledger: Ledger, why: Refused) -> None:
        for file in self.files:
            file.refuse(ledger, why)


def together(name: str, files: list[MaskFile]) -> StudyMask:
    """The files that a study has for a mask. Raises Refused unless they are one, or each of a segment of its own."""
    segments = {file.segment for file in files}
    if len(files) > 1 and ("" in segments or len(segments) < len(files)):
        raise Refused("several_masks", f"{len(files)} files of its study are for the mask")
    return StudyMask(name, tuple(sorted(files, key=lambda file: file.input.path)))


def apart(
    dataset: Dataset, candidates: list[Candidate], ledger: Ledger
) -> tuple[list[Candidate], list[MaskFile], dict[str, set[str]]]:
    """The candidates for images; the masks; and by patient the identifiers that headers of masks name.

    What is neither is refused in the ledger.
    """
    images, masks = [], []
    known: dict[str, set[str]] = {}
    for candidate in candidates:
        try:
            if not _is_mask(dataset, candidate):
                images.append(candidate)
                continue
        except Refused as why:
            ledger.refuse(IMAGES, candidate.input.path, why)
            continue
        names = [name for name in candidate.roles if name in dataset.masks]
        for name in names:
            ledger.expect(IMAGES, candidate.input.path, name)
        for name in names:
            mask, header = dataset.masks[name], candidate.header
            try:
                owner = owner_of(name, mask, dataset.images[mask.image].study_tag, candidate)
                if not owner[0]:
                    raise Refused("no_patient", "it names no patient")
            except Refused as why:
                ledger.refuse_part(IMAGES, candidate.input.path, name, why)
                continue
            known.setdefault(owner[0], set()).update(header.names if header else ())
            refers = header.refers if header else None
            segment = "" if header else _segment(mask.path, candidate.input.path)
            masks.append(MaskFile(name, candidate.kind, candidate.input, owner, refers, segment))
    return images, masks, known


def _segment(pattern: str, path: str) -> str:
    found = patterns.fullmatch(pattern, path) if pattern else None
    return (found.groupdict().get("segment") or "") if found else ""


def _is_mask(dataset: Dataset, candidate: Candidate) -> bool:
    """Whether a file is no image: its header says so, or masks alone ask for it. Raises Refused."""
    asked = [name for name in candidate.roles if name in dataset.masks]
    if candidate.header is not None and candidate.header.segments:
        if not asked:
            raise Refused("no_mask", "it is a segmentation, and no mask asks for it")
        return True
    if candidate.header is not None and len(asked) == len(candidate.roles):
        raise Refused("not_a_mask", "it is a DICOM image")
    return len(asked) == len(candidate.roles)
