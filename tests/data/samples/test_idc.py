"""A store of series without images, from a small index in the layout of IDC's."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mmfm_jax.cli import main
from mmfm_jax.data.samples import idc
from mmfm_jax.data.split import FRACTIONS, pseudonym, split_of
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError

SERIES = 400


@pytest.fixture
def rows(tmp_path, monkeypatch) -> list[dict]:
    """Rows of the index, drawn at random; makers and body parts of fewer than 20 series have no name."""
    rng = np.random.default_rng(0)

    def one(i: int) -> dict:
        def some(*values):
            return values[int(rng.integers(len(values)))]

        return {
            "PatientID": f"public {rng.integers(60)}",
            "SeriesDescription": some(None, "", f"Axial {i}", "T1 «naïve»"),
            "StudyDescription": some(None, "CHEST"),
            "PatientSex": some("F", "M", "O", None, "0000"),
            "Manufacturer": some("GE ", "GE", "SIEMENS", *["Rare"] * (i == 7)),
            "collection_id": some("a", "b", "c"),
            "license_short_name": some("CC BY 4.0", "CC BY-NC 4.0"),
            "PhotometricInterpretation": some(None, "RGB"),
            "PatientAge": some("066Y", "018M", "010D", None, "old", "66Y"),
            "instanceCount": int(rng.integers(1, 300)),
            "series_size_MB": float(rng.exponential()),
            "Modality": some("CT", "MR", "SEG"),
            "BodyPartExamined": some("CHEST", "Chest", None, *["NOSE"] * (i == 9)),
            "SeriesInstanceUID": f"1.2.{i}",
        }

    made = [one(i) for i in range(SERIES)]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "idc_index.parquet")
    monkeypatch.setattr(idc, "_index", lambda: tmp_path / "idc_index.parquet")
    monkeypatch.setattr(idc, "LEAST_OF_A_KIND", 20)
    monkeypatch.setattr(idc, "_BATCH", 64)
    return made


def test_each_series_is_a_study_with_what_its_row_says(rows, tmp_path, capsys):
    main(["sample", "idc", "--out", str(tmp_path / "store"), "--split-key", "key"])
    store = StudyStore.open(str(tmp_path / "store"))
    assert len(store) == SERIES and set(store.schema.columns["manufacturer"].vocabulary) == {"GE", "SIEMENS"}
    assert store.schema.labels["body_part"].classes == ("CHEST",) and not store.schema.images
    years = {"066Y": 66, "018M": 1.5, "010D": 10 / 365.25}
    sexes = {"F": "female", "M": "male", "O": "other"}
    for number, row in enumerate(rows):
        texts, values, labels = store.table(number)
        said = {"series": row["SeriesDescription"], "study": row["StudyDescription"]}
        assert texts == {name: (text,) for name, text in said.items() if text}
        assert (values["instances"], values["size_mb"]) == (row["instanceCount"], row["series_size_MB"])
        assert values.get("age_years") == pytest.approx(years.get(row["PatientAge"]))
        assert values.get("sex") == sexes.get(row["PatientSex"])
        maker = row["Manufacturer"].strip()
        assert values.get("manufacturer") == (maker if maker != "Rare" else None)
        assert (values["collection"], values["license"]) == (row["collection_id"], row["license_short_name"])
        assert store.schema.labels["modality"].classes[labels["modality"]] == row["Modality"]
        assert ("body_part" in labels) == ((row["BodyPartExamined"] or "").upper() == "CHEST")


def test_patients_are_hashed_and_in_one_split_and_licences_are_told(rows, tmp_path):
    with (tmp_path / "said").open("w") as said:
        console = Console(file=said, width=200)
        assert idc.build_idc(str(tmp_path / "store"), "key", console)
        assert not idc.build_idc(str(tmp_path / "store"), "key", console)
    store = StudyStore.open(str(tmp_path / "store"))
    everyone = [row["PatientID"] for row in rows]
    assert store.patients(np.arange(SERIES)).tolist() == [pseudonym(patient, "key") for patient in everyone]
    for split in FRACTIONS:
        held = [i for i, patient in enumerate(everyone) if split_of(patient, "key") == split]
        assert store.rows(split).tolist() == held
    counted = {name: sum(row["license_short_name"] == name for row in rows) for name in ("CC BY 4.0", "CC BY-NC 4.0")}
    for name, n in counted.items():
        assert f"{n} {name}" in (tmp_path / "said").read_text() and f"{n} {name}" in store.file.description
    files = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(b"public " in data or b"1.2.3" in data for data in files)
    with pytest.raises(UserError, match="already holds a store with another source, split key or schema"):
        idc.build_idc(str(tmp_path / "store"), "other")


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install idc-index-data==25\.0\.5`"):
        idc.build_idc(str(tmp_path / "store"), "key")
