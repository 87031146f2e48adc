"""Every test file in the wheels of pydicom and nibabel, some broken on purpose, is taken or refused with a reason."""

import importlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from mmfm_jax.data.deid.identifiers import Hider
from mmfm_jax.data.ingest.inputs import Files
from mmfm_jax.data.ingest.pool import Limits
from mmfm_jax.data.ingest.run import ingest
from mmfm_jax.data.store.study_store import StudyStore

pydicom = pytest.importorskip("pydicom")
nib = pytest.importorskip("nibabel")
KEY = "a key of the tests, long enough"


@pytest.mark.parametrize(
    ("package", "below", "at_least", "taken"), [("pydicom", "data/test_files", 150, 45), ("nibabel", "", 100, 8)]
)
def test_every_file_is_taken_or_refused(tmp_path, package, below, at_least, taken):
    root = Path(importlib.import_module(package).__file__ or "").parent / below
    role = {
        "files": ["**"],
        "path": "(?P<patient>.*)",  # each file a patient of its own
        "dtype": "float32",
        "unknown_spacing_mm": [1, 1, 1],
        "allow": ["burned_in_text", "face"],
    }
    described = {"root": str(root), "key": {"file": "key"}, "images": {"image": role}}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(described))
    (tmp_path / "key").write_text(KEY)
    limits = Limits(workers=2, memory_bytes=2**30, seconds=60)
    outcome = ingest(tmp_path / "dataset.yaml", str(tmp_path / "store"), limits, console=Console(file=io.StringIO()))
    counts = outcome.counts["images"]
    files = set(Files(root).by_path)
    assert counts.inputs == len(files) == counts.taken + counts.refused and len(files) >= at_least
    assert counts.taken >= taken
    assert not {reject.reason for reject in outcome.rejects} & {"crashed", "timeout", "out_of_memory"}
    store = StudyStore.open(str(tmp_path / "store"))
    rows = dict(zip(store.patients(np.arange(len(store))).tolist(), range(len(store))))
    assert len(rows) == counts.taken
    hider = Hider(KEY)
    for path in sorted(files):
        row = rows.pop(hider.patient(path), None)
        if row is not None:
            info = store.volume_info("image", row)
            assert info is not None
            ours = store.crop("image", row, (0, 0, 0), info[0])
            np.testing.assert_allclose(np.sort(ours, axis=None), theirs(root / path), rtol=1e-6, err_msg=path)
    assert not rows


def theirs(path: Path) -> np.ndarray:
    """Sorted values as pydicom's or nibabel's own functions give them, wherever they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.name.endswith((".nii", ".nii.gz", ".mgz")):
            return np.sort(nib.load(path).get_fdata(dtype=np.float32), axis=None)
        from pydicom.pixels.processing import apply_modality_lut

        ds = pydicom.dcmread(path, force=True)
        values = ds.pixel_array
        if ds.PhotometricInterpretation == "MONOCHROME1":
            values = 2**ds.BitsStored - 1 - values
        values = apply_modality_lut(values, ds) * float(ds.get("DoseGridScaling", 1))
        return np.sort(values.astype(np.float32), axis=None)
