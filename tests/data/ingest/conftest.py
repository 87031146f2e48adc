"""A small hospital: DICOM series, a table, reports, photographs, and the description that ingests them."""

import csv
import filecmp
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from mmfm_jax.data.ingest.pool import Limits
from mmfm_jax.data.ingest.run import Outcome, ingest

KEY = "a key of the tests, long enough"
DESCRIBED = {
    "description": "Chest CT with reports.",
    "root": "exports",
    "key": {"file": "key.txt"},
    "tables": {"visits": {"file": "visits.csv", "patient": "mrn", "study": "accession", "identifiers": ["name"]}},
    "images": {
        "ct": {"files": ["dicom/**"], "modality": "CT", "study_tag": "AccessionNumber"},
        "photo": {
            "files": ["photos/*.png"],
            "path": r"photos/(?P<patient>[^_]+)_(?P<study>[^.]+)\.png",
            "dtype": "uint8",
            "channels": 3,
            "shape": [1, 6, 5],
            "unknown_spacing_mm": [1, 1, 1],
            "allow": ["burned_in_text", "face"],
        },
    },
    "texts": {
        "findings": {"column": "report", "section": "findings"},
        "note": {"files": ["notes/*.txt"], "path": r"notes/(?P<patient>[^_]+)_(?P<study>[^.]+)\.txt"},
    },
    "columns": {
        "age": {"kind": "number", "unit": "years"},
        "sex": {"kind": "category", "vocabulary": ["female", "male"], "values": {"F": "female", "M": "male"}},
        "seen": {"kind": "date"},
        "born": {"kind": "date", "relative_to": "seen"},
        "kvp": {"kind": "number", "unit": "kV", "image": "ct", "tag": "KVP"},
    },
    "labels": {"nodule": {"classes": ["no", "yes"], "values": {"0": "no", "1": "yes"}}},
}


class Hospital:
    """Writes exports of patients, and remembers what the store must hold of them."""

    def __init__(self, folder: Path, write_dicom: Callable):
        self.folder, self.described, self._write_dicom = folder, folder / "dataset.yaml", write_dicom
        self.exports = folder / "exports"
        self.exports.mkdir(parents=True)
        (folder / "key.txt").write_text(KEY)
        self.rows: list[dict] = []
        self.volumes: dict[tuple[str, str], np.ndarray] = {}
        """RAS, [z, y, x]."""
        self.describe({})

    def describe(self, changes: dict) -> None:
        self.described.write_text(yaml.safe_dump(DESCRIBED | changes))

    def admit(self, patient: str, study: str, seed: int, **tags) -> None:
        """One study with a CT series, a photograph, a note and a row."""
        from PIL import Image

        rng = np.random.default_rng(seed)
        voxels = rng.integers(-1000, 2000, rng.integers(3, 7, 3)).astype(np.int16)
        affine = np.diag([-0.7, -0.7, 2.5, 1.0])  # axial: rows to the back, columns to the left
        ids = {"PatientID": patient, "AccessionNumber": study, "PatientName": f"Quux{patient}^Ann", "KVP": "120"}
        self._write_dicom(self.exports / f"dicom/{patient}/{study}", voxels, affine, seed, **(ids | tags))
        self.volumes[patient, study] = voxels[:, ::-1, ::-1]
        for folder in ("photos", "notes"):
            (self.exports / folder).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (6, 5, 3), np.uint8)).save(self.exports / f"photos/{patient}_{study}.png")
        (self.exports / f"notes/{patient}_{study}.txt").write_text(f"Quux{patient} is well, says Dr. Zimmer.")
        self.rows.append(
            {
                "mrn": patient,
                "accession": study,
                "name": f"Quux{patient}, Ann",
                "age": "61.5",
                "sex": "F",
                "seen": "2021-03-04",
                "born": "1960-03-04",
                "nodule": seed % 2,
                "report": f"EXAM: CT\nFindings: Nodule {seed % 7 + 1} mm, see Quux{patient}.\nImpression: none",
                "secret": "never declared",
            }
        )
        self.write_table()

    def write_table(self) -> None:
        with (self.exports / "visits.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def ingest(self, out: Path, **more) -> Outcome:
        """Runs ingest; `self.said` is what it showed."""
        screen = io.StringIO()
        limits = Limits(workers=2, memory_bytes=2**30, seconds=60)
        try:
            return ingest(self.described, str(out), limits, console=Console(file=screen), **more)
        finally:
            self.said = screen.getvalue()


@pytest.fixture
def hospital(tmp_path, write_dicom) -> Hospital:
    made = Hospital(tmp_path / "hospital", write_dicom)
    for i in range(6):
        made.admit(f"MRN{1000 + i // 2}", f"ACC{i}", seed=i)
    return made


@pytest.fixture(scope="session")
def same_bytes() -> Callable[[Path, Path], bool]:
    """Whether two folders hold the same files."""

    def same(a: Path, b: Path) -> bool:
        files = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
        return files[0] == files[1] and filecmp.cmpfiles(a, b, files[0], shallow=False)[1:] == ([], [])

    return same
