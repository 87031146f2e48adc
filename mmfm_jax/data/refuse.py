"""Why an input is refused, in words that hold nothing of the input: a reason, a sentence and a mend.

Whatever leaves ingest about a refused file or row passes here, so names of files, values of cells and the messages of
other people's libraries (which quote both) cannot reach a store, a log or the terminal.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from mmfm_jax.data import parquet

_MOST_BYTES = 4 * 2**30
MENDS = {
    # ---- files
    "outside_root": "keep inputs inside the root folder and copy what links lead to",
    "not_a_file": "leave folders, pipes and devices out of the pattern",
    "unreadable": "give the user that runs ingest the right to read it",
    "missing_file": "mend the path in the table or add the file",
    "archive": "unpack it first; archives are never opened",
    "unknown_format": "leave it out of the pattern or convert it to a format that is read",
    "damaged": "export it again; it does not hold what its header says",
    "no_image": "leave it out of the pattern; it holds no pixels",
    "too_large": "raise --memory, or leave it out of the pattern",
    "out_of_memory": "raise --memory, or leave it out of the pattern",
    "timeout": "raise --timeout, or leave it out of the pattern",
    "crashed": "export it again; it stopped the program that reads its format",
    "unsupported": "convert it to a form that is read (docs/data.md lists them)",
    "empty": "leave it out of the pattern; there is nothing in it",
    # ---- whose it is
    "no_patient": "say whose it is: a `path` pattern with a patient group, or the patient's identifier in the source",
    "no_study": "give it a study identifier; its patient has several studies",
    "no_role": "widen modality or series_description of an image role, or narrow its files",
    "several_roles": "narrow modality, series_description or files until one image role takes it",
    "several_series": "narrow the role with series_description, or set its `several` to largest",
    "another_series": "nothing, if the larger series is the one wanted; else narrow the role with series_description",
    "mixed_series": "export the series again; its files disagree on whom or what they show",
    "unmatched": "nothing, if its patients have no study; else spell their identifiers as the other sources do",
    # ---- events
    "not_meds": "export it with subject_id, time and code as MEDS has them, or leave it out of the pattern",
    "withdrawn": "nothing; its status says that it was cancelled, refuted or entered in error",
    "no_time": "add the time to the day, or declare the column static",
    "unknown_unit": "list the unit under `units` of the column with its factor, or as '' when none is stated",
    "same_time": "keep one of the values of that time, or take mean, min or max",
    # ---- geometry
    "mixed_geometry": "split the series by orientation, size and pixel spacing",
    "duplicate_slices": "split the series by echo, phase or reconstruction: several slices lie at one position",
    "missing_slices": "export the series again with all its slices",
    "uneven_slices": "resample the series to even slices first",
    "gantry_tilt": "straighten the series first; its slices are sheared",
    "no_position": "choose one frame with `frame`, or export with positions",
    "spacing_unknown": "declare unknown_spacing_mm of the role",
    "orientation_unknown": "set the orientation in the file; left and right cannot be told",
    "sheared": "resample it to a grid with right angles first",
    # ---- voxels
    "channels": "declare the number of channels of the role, or choose one with `frame`",
    "shape": "declare another shape, or null for images of any shape",
    "out_of_range": "declare a wider dtype for the role",
    "would_round": "declare dtype float32 for the role; rounding would lose its values",
    "not_finite": "replace NaN and infinite voxels first",
    # ---- masks
    "no_mask": "declare a mask that takes it under masks, or leave it out of the pattern",
    "not_a_mask": "give a DICOM SEG or RTSTRUCT object, or a volume of whole numbers that stand for classes",
    "no_reference": "export it again with references to its series, or convert it to NIfTI, NRRD or MetaImage",
    "other_image": "nothing, if another series is the one wanted; else narrow the image's role to the mask's series",
    "image_missing": "bring the image that it is of; a mask is kept only beside its image",
    "several_masks": "narrow the files of the mask until each study has one, or name a group `segment` in its path",
    "off_grid": "resample the mask to the grid of its image",
    "unknown_class": "add it to `values` of the mask, or set its `others` to background",
    "overlapping_segments": "declare a mask of its own, with `others` background, for structures that overlap",
    # ---- privacy
    "burned_in_text": "look at it, and if it shows no text list burned_in_text under `allow` of the role",
    "face": "remove the face (defacing), and then list face under `allow` of the role",
    # ---- tables and texts
    "bad_row": "give the row as many cells as the table has columns",
    "empty_study": "nothing else of this study was taken; mend its other inputs",
    "not_a_number": "correct the cell, or list what stands for a missing value under `missing`",
    "not_a_date": "correct the cell, or declare the date format of the column",
    "not_in_vocabulary": "add the value to the vocabulary or classes, or map it with `values`",
    "contradiction": "keep one row; an earlier one of the same study says otherwise",
    "differs_in_series": "the tag has several values within the series; leave it out",
    "over_89": "declare the age instead; a date may not reach back 90 years or more before the newest",
    "no_section": "the report has no such heading; leave the section out or correct the report",
    "not_utf8": "save the text as UTF-8",
    "bad_split": "give the patient one split, the same in every row, by a name of letters, digits and _",
}


class Refused(Exception):
    """An input that cannot be taken; `detail` may hold numbers and declared names, never text from the input."""

    def __init__(self, reason: str, detail: str):
        assert reason in MENDS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, order=True)
class Reject:
    """One input, or one value of an input, that is not in the store."""

    source: str
    """The declared part that it was for, such as images.ct or tables.visits."""
    file: str
    """Keyed hash of the path below the root; `mmfm rejects` turns it back for who holds key and files."""
    row: int
    """Row of a table, from 1; 0 for a file."""
    part: str
    """Empty when the whole file or row is refused, else the column, label or text whose value is left out."""
    reason: str
    detail: str

    @property
    def mend(self) -> str:
        return MENDS[self.reason]


SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("part", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("mend", pa.string()),
    ]
)


def to_parquet(rejects: Iterable[Reject]) -> bytes:
    """`rejects.parquet`, sorted, so that the same rejects give the same bytes."""
    rows = [{name: getattr(reject, name) for name in SCHEMA.names} for reject in sorted(rejects)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes) -> list[Reject]:
    """The inverse of `to_parquet`. Raises ValueError for what it cannot have written."""
    names = [name for name in SCHEMA.names if name != "mend"]
    found = [Reject(**row) for row in parquet.read(data, SCHEMA, names, _MOST_BYTES).to_pylist()]
    if any(reject.reason not in MENDS or None in vars(reject).values() for reject in found):
        raise ValueError("it names a reason that there is not")
    return found
