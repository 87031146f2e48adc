"""The bench reads with every loader the same crops of the same volumes, and says what it leaves out."""

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from mmfm_jax.bench import data, monai_loader
from mmfm_jax.bench.cores import core_seconds
from mmfm_jax.cli import main
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, ImageSpec, Schema, Study
from mmfm_jax.experiment import to_yaml

monai_installed = pytest.mark.skipif(monai_loader.why_not() is not None, reason="monai or nibabel is not installed")


@pytest.fixture
def experiment(make_experiment, tmp_path):
    """Crops at random places of volumes of many sizes, one study in four without any."""
    rng = np.random.default_rng(0)
    studies = []
    for i in range(12):
        voxels = rng.integers(0, 255, (*(int(s) for s in rng.integers(10, 20, 3)), 1)).astype(np.int16)
        studies.append(Study(f"p{i}", "train", {"ct": Image(voxels, (2.0, 0.5, 0.5))} if i % 4 else {}))
    write_store(str(tmp_path / "store"), Schema(images={"ct": ImageSpec(dtype="int16", shape=None)}), studies)
    changes = {
        "data.store": str(tmp_path / "store"),
        "data.vocabulary_size": 300,
        "inputs": {"images": {"ct": {"size": [8, 8, 8], "patch": [4, 4, 4], "window": [0, 255], "crop": "random"}}},
        "tasks": {"masked": {"kind": "masked", "depth": 1}},
        "train.batch_size": 4,
    }
    return make_experiment(changes)


def test_ceiling_and_pipeline_read_the_same_crops(experiment):
    reading = data.Reading(experiment)
    drawn = [reading._drawn(i) for i in range(40)]
    for i, study in enumerate(drawn):
        part = study.read().images["ct"]
        assert part.present == ("ct" in study.boxes)
        if part.present:
            np.testing.assert_array_equal(reading._array(i, "ct").read().result(), part.voxels.transpose(3, 0, 1, 2))
    first = (reading.ahead + 1) * reading.size  # what comes before the clock starts
    counted = sum("ct" in study.boxes for study in drawn[first : first + 3 * reading.size])
    assert sum(reading.batches(0, 3)) == counted > 0
    whole = sum("ct" in study.boxes for study in drawn[: first + 3 * reading.size])
    assert sum(reading.crops(0, 3)) == whole - reading.size * (1 + reading.ahead)  # as many are still under way


def test_json_says_what_was_measured_and_what_was_not(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(monai_loader, "find_spec", lambda name: None)
    config = tmp_path / "experiment.yaml"
    config.write_text(to_yaml(experiment))
    main(["bench", "data", str(config), "--rounds", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["monai"] is None and "monai and nibabel not installed" in found["without_monai"]
    for way in ("pipeline", "ceiling"):
        speed = found[way]
        assert speed["megabytes_per_second"] == pytest.approx(speed["crops_per_second"] * 8**3 * 2 / 1e6)
    assert found["pipeline"]["batches_per_second"] == pytest.approx(found["pipeline"]["crops_per_second"] / 4)
    assert len(found["share_of_ceiling_each"]) == 2
    main(["bench", "data", str(config), "--rounds", "1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "MONAI is left out" in said and "'mmfm_jax[reference,ingest]'" in said


def test_cores_that_a_started_process_takes_are_counted():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before, deadline = core_seconds() - time.process_time(), time.monotonic() + 60
        while core_seconds() - time.process_time() < before + 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert core_seconds() - time.process_time() >= before + 0.1
    finally:
        busy.kill()
        busy.wait()


def test_a_share_that_cannot_be_is_doubted():
    assert data.doubt([0.7, 0.8, 0.9]) is None
    assert "differ by more than half" in str(data.doubt([0.3, 0.9, 0.3]))
    assert "above 100%" in str(data.doubt([0.9, 2.87, 0.95]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: is neither a file nor ct-96"),
        (["CONFIG", "--data.store", "nowhere"], "there is no store here"),
    ],
)
def test_what_cannot_be_measured_is_an_error(experiment, tmp_path, capsys, arguments, message):
    config = tmp_path / "experiment.yaml"
    config.write_text(to_yaml(experiment))
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "data", *(str(config) if word == "CONFIG" else word for word in arguments)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@monai_installed
def test_monai_is_given_the_volumes_of_the_store(experiment, tmp_path):
    from monai.transforms.io.array import LoadImage

    reading = data.Reading(experiment)
    rates, why_not = data._monai(reading, tmp_path, workers=1)
    assert why_not is None and rates is not None
    assert rates["plain"]["crops_per_second"] > 0 and rates["persistent"]["crops_per_second"] > 0
    store = StudyStore.open(experiment.data.store)
    files = sorted((tmp_path / "nifti").glob("*.nii.gz"))
    assert len(files) == data.MONAI_VOLUMES
    for path in files:
        row = int(path.name.split(".")[0])
        info = store.volume_info("ct", row)
        assert info is not None
        read: Any = LoadImage(dtype=None)(str(path))
        np.testing.assert_array_equal(np.asarray(read).T, store.crop("ct", row, (0, 0, 0), info[0])[..., 0])
        np.testing.assert_allclose(np.asarray(read.pixdim), info[1][::-1])
        assert np.asarray(read).dtype == np.int16
