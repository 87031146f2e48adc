"""The 18 identifiers of 45 CFR 164.514(b)(2) are planted everywhere, and nothing that ingest writes or says has one."""

import base64
import json
import subprocess
import sys
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmfm_jax.data.inspect.page import write_page
from mmfm_jax.data.store.study_store import StudyStore

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("PIL")

PLANTED = {
    "names": ["Quuxworth", "Zebulon", "Dr. Yxwander Krell"],
    "geographic": ["4711 Xanadu Street", "Zzyzx", "92309"],
    "dates": ["1931-07-23", "19310723", "07/23/1931", "23 July 1931"],
    "telephone": ["(617) 555-0147", "617-555-0147"],
    "fax": ["617-555-0148"],
    "email": ["zebulon.q@mail.example.org"],
    "social security": ["078-05-1120"],
    "medical record": ["MRN7744991", "7744991"],
    "health plan": ["HPX 998 271 553", "HPX998271553"],
    "account": ["ACCT5566778"],
    "licence": ["D08954796"],
    "vehicle": ["1HGCM82633A004352", "KLM 4477"],
    "device": ["SN-PACE-448811"],
    "url": ["https://portal.example.org/p/zebulon"],
    "ip": ["198.51.100.77"],
    "biometric": ["FPT-5599-AA71"],
    "other": ["TRIAL-0099-X7731", "1.2.840.99999.1.20210304.7744991"],
}
"""The eighteenth, photographs of the face, has a test of its own below."""
SECRETS = [secret for secrets in PLANTED.values() for secret in secrets]

REPORT = """Patient: Zebulon Quuxworth   MRN: 7744991   DOB: 07/23/1931   SSN 078-05-1120
Address: 4711 Xanadu Street, Zzyzx, CA 92309. Phone (617) 555-0147, fax 617-555-0148, zebulon.q@mail.example.org
Health plan number HPX998271553, account ACCT5566778, license D08954796, VIN 1HGCM82633A004352, plate KLM 4477.
Portal https://portal.example.org/p/zebulon from 198.51.100.77. Fingerprint template FPT-5599-AA71. TRIAL-0099-X7731.
FINDINGS: Mr. Quuxworth, a 93-year-old man born 23 July 1931, has a pacemaker, serial number SN-PACE-448811.
The nodule of 7 mm is stable since 1931-07-23. UID 1.2.840.99999.1.20210304.7744991.
IMPRESSION: Benign. Signed by Dr. Yxwander Krell, 07/23/1931 14:05. Discussed with Zebulon at 617-555-0147.
"""


@pytest.fixture
def planted(tmp_path, write_dicom):
    """A data set with every secret in headers, file names, table and reports; some of its inputs are refused."""
    from PIL import Image

    root = tmp_path / "exports"
    folder = root / "Quuxworth Zebulon 1931-07-23" / "MRN7744991 198.51.100.77"
    header = {
        "PatientID": "MRN7744991",
        "PatientName": "Quuxworth^Zebulon",
        "PatientBirthDate": "19310723",
        "StudyDate": "19310723",
        "PatientAge": "093Y",
        "PatientAddress": "4711 Xanadu Street, Zzyzx, CA 92309",
        "PatientTelephoneNumbers": "617-555-0147",
        "ReferringPhysicianName": "Krell^Yxwander^^Dr.",
        "ReferringPhysicianTelephoneNumbers": "617-555-0148",
        "OtherPatientIDs": ["078-05-1120", "HPX998271553", "ACCT5566778", "D08954796"],
        "DeviceSerialNumber": "SN-PACE-448811",
        "PatientComments": f"{'; '.join(SECRETS)}"[:60],
        "ImageComments": "; ".join(SECRETS),
        "RetrieveURL": "https://portal.example.org/p/zebulon",
        "StudyInstanceUID": "1.2.840.99999.1.20210304.7744991",
        "AccessionNumber": "TRIAL-0099-X7731",
        "KVP": "120",
    }
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    for path in write_dicom(folder / "ct", voxels, np.diag([1, 1, 2, 1.0]), **header):
        ds = pydicom.dcmread(path)
        block = ds.private_block(0x0099, "; ".join(SECRETS)[:60], create=True)
        for i, secret in enumerate(SECRETS):
            block.add_new(i, "LO", secret)
        ds.preamble = "; ".join(SECRETS).encode()[:128]
        ds.save_as(path)
    write_dicom(folder / "head", voxels, np.eye(4), **(header | {"BodyPartExamined": "HEAD"}))
    for path in write_dicom(folder / "torn", voxels, np.eye(4), **header):
        path.write_bytes(b"\0" * 128 + b"DICM" + REPORT.encode())
    exif = Image.Exif()
    exif[0x010E], exif[0x8298] = REPORT, "Zebulon Quuxworth"
    picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
    (root / "skin").mkdir()
    picture.save(root / "skin/Zebulon_MRN7744991.png", exif=exif, comment=REPORT)
    (root / "notes").mkdir()
    (root / "notes/Quuxworth_MRN7744991.txt").write_text(REPORT)
    (root / "notes/Zebulon.txt").write_text(REPORT)  # names no patient, so it is refused
    (root / "notes/link_MRN7744991.txt").symlink_to("/etc/hostname")
    columns = ["mrn", "name", "ssn", "sex", "age", "born", "seen", "report", "weight"]
    good = ["MRN7744991", "Zebulon Quuxworth", "078-05-1120", "M", "93", "1931-07-23", "2024-05-06", REPORT, "70"]
    bad = ["MRN7744991", *SECRETS[:3], *SECRETS[3:7], SECRETS[7]]
    lines = [columns, good, bad, ["Zebulon Quuxworth"], [*SECRETS[:9]]]
    quoted = ("; ".join(SECRETS)).replace('"', "'")
    (root / "Zebulon.csv").write_text(
        "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines) + f'\n"MRN7744991","{quoted}"\n'
    )
    described = {
        "root": "exports",
        "key": {"file": "key"},
        "tables": {"visits": {"file": "Zebulon.csv", "patient": "mrn", "identifiers": ["name", "ssn"]}},
        "images": {
            "ct": {"files": ["**/*.dcm"], "modality": "CT"},
            "skin": {
                "files": ["skin/*"],
                "path": r"skin/[^_]+_(?P<patient>\w+)\.png",
                "dtype": "uint8",
                "channels": 3,
                "allow": ["burned_in_text", "face"],
                "unknown_spacing_mm": [1, 1, 1],
            },
        },
        "texts": {
            "report": {"column": "report"},
            "impression": {"column": "report", "section": "impression"},
            "note": {"files": ["notes/*"], "path": r"notes/[^_]+_(?P<patient>\w+)\.txt"},
        },
        "columns": {
            "age": {"kind": "number", "unit": "years"},
            "sex": {"kind": "category", "vocabulary": ["F", "M"]},
            "born": {"kind": "date"},
            "seen": {"kind": "date"},
            "scan_age": {"kind": "number", "unit": "years", "image": "ct", "tag": "PatientAge"},
            "kvp": {"kind": "number", "image": "ct", "tag": "KVP"},
        },
    }
    (tmp_path / "key").write_text("no one knows this key 0123456789")
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(described))
    return tmp_path


def everything(path) -> str:
    """Every byte of every file below a folder, its names, and every value of its Parquet files."""
    parts = []
    for file in sorted(path.rglob("*")):
        parts.append(str(file.relative_to(path)))
        if file.is_file():
            parts.append(file.read_bytes().decode("latin-1"))
            if file.suffix == ".parquet":
                parts.append(str(pq.read_table(file).to_pylist()))
                parts.append(str(pq.read_metadata(file).metadata))
    return "\n".join(parts)


def assert_clean(text: str, where: str) -> None:
    low = text.lower()
    found = [secret for secret in SECRETS if secret.lower() in low]
    assert not found, f"{where}: {found}"
    for word in ("quuxworth", "zebulon", "krell", "yxwander", "xanadu", "zzyzx", "no one knows this key"):
        assert word not in low, f"{where}: {word}"


@pytest.fixture
def run(planted):
    def ingest(*more) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "mmfm_jax.cli",
            "ingest",
            "dataset.yaml",
            "--out",
            "made/store",
            "--workers",
            "1",
        ]
        return subprocess.run([*command, *more], cwd=planted, capture_output=True, text=True, timeout=300)

    return ingest


def test_none_of_them_is_in_the_store_in_rejects_or_on_the_screen(planted, run):
    done = run()
    assert done.returncode == 3, done.stderr
    assert_clean(done.stdout + done.stderr, "the screen")
    store = StudyStore.open(str(planted / "made/store"))
    assert write_page(store, None).parent == planted / "made/store"
    assert_clean(everything(planted / "made"), "the store and its page")
    (row,) = [row for row in range(len(store)) if store.volume_info("ct", row)]
    texts, values, _ = store.table(row)
    assert len(store) == 2 and store.volume_info("skin", row)  # the other is the row whose patient is a name
    assert "nodule of 7 mm is stable since [DATE]" in texts["report"][0]
    assert texts["impression"][0].startswith("Benign. Signed by Dr. [")
    assert "a [AGE]-year-old man" in texts["note"][0]
    assert values["age"] == values["scan_age"] == 90 and values["kvp"] == 120 and values["sex"] == "M"
    assert "born" not in values and "seen" in values  # it would tell an age of 93
    rejects = pq.read_table(planted / "made/store/rejects.parquet").to_pylist()
    assert {r["reason"] for r in rejects} >= {
        "face",
        "unknown_format",
        "no_patient",
        "bad_row",
        "over_89",
        "outside_root",
    }


def test_a_killed_run_leaves_nothing_either(planted, run):
    script = (
        "import sys; from mmfm_jax.data.ingest import run; run.write = lambda *a: sys.exit('stopped'); "
        "from mmfm_jax.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "ingest", "dataset.yaml", "--out", "made/store", "--workers", "1"]
    done = subprocess.run(command, cwd=planted, capture_output=True, text=True, timeout=300)
    assert done.stderr.endswith("stopped\n")
    assert list((planted / "made").glob(".store.ingest/*.npy"))
    assert_clean(everything(planted / "made") + done.stdout + done.stderr, "what is left")


def test_only_who_holds_the_key_learns_which_file_was_refused(planted, run):
    run()
    command = [sys.executable, "-m", "mmfm_jax.cli", "rejects", "made/store", "dataset.yaml"]
    named = subprocess.run(command, cwd=planted, capture_output=True, text=True, timeout=300)
    assert "notes/Zebulon.txt: no_patient" in named.stdout and "Zebulon.csv row 3: bad_row" in named.stdout
    (planted / "key").write_text("another key, no one knows either")
    refused = subprocess.run(command, cwd=planted, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "another key" in refused.stderr and not refused.stdout


def test_faces_and_burned_in_text_wait_until_they_are_allowed(hospital, tmp_path):
    """Photographs of the face, the eighteenth identifier, and pictures that carry text."""
    hospital.admit("MRN3000", "ACC30", seed=30, BodyPartExamined="HEAD")
    hospital.admit("MRN3001", "ACC31", seed=31, BurnedInAnnotation="YES")
    hospital.admit("MRN3002", "ACC32", seed=32, BodyPartExamined="")
    first = hospital.ingest(tmp_path / "store")
    assert {(r.source, r.reason) for r in first.rejects} == {("images", "face"), ("images", "burned_in_text")}
    photo = {"files": ["photos/*"], "path": r"photos/(?P<patient>[^_]+)_.*", "dtype": "uint8", "channels": 3}
    hospital.describe({"images": {"photo": photo | {"unknown_spacing_mm": [1, 1, 1]}}, "columns": {}, "texts": {}})
    second = hospital.ingest(tmp_path / "photos")
    assert {r.reason for r in second.rejects if r.source == "images"} == {"burned_in_text"}
    ct = {
        "files": ["dicom/**"],
        "study_tag": "AccessionNumber",
        "body_part": "CHEST",
        "allow": ["face", "burned_in_text"],
    }
    hospital.describe({"images": {"ct": ct}, "texts": {}})
    assert hospital.ingest(tmp_path / "allowed").rejects == []


@pytest.fixture
def charted(tmp_path):
    """The secrets in FHIR resources and MEDS shards: their values, notes, codes and file names."""
    root = tmp_path / "exports"
    root.mkdir()
    subject = {"reference": "Patient/1.2.840.99999.1.20210304.7744991"}
    note = {"note": [{"text": REPORT}], "subject": subject, "status": "final"}
    person = {
        "resourceType": "Patient",
        "id": "1.2.840.99999.1.20210304.7744991",
        "identifier": [{"system": "mrn", "value": "7744991"}, *({"value": secret} for secret in SECRETS)],
        "name": [{"text": "Zebulon Quuxworth", "family": "Quuxworth", "given": ["Zebulon"]}],
        "telecom": [{"value": "(617) 555-0147"}, {"value": "zebulon.q@mail.example.org"}],
        "address": [{"line": ["4711 Xanadu Street"], "city": "Zzyzx", "postalCode": "92309"}],
        "birthDate": "1931-07-23",
        "gender": "Zebulon Quuxworth",
        "photo": [{"url": "https://portal.example.org/p/zebulon"}],
    }
    coding = [{"system": "loinc", "code": "2160-0", "display": REPORT}]
    data = base64.b64encode(REPORT.encode()).decode()
    resources = [
        person,
        note | {
            "resourceType": "Observation",
            "code": {"coding": coding},
            "effectiveDateTime": "2024-05-06T10:00:00Z",
            "valueQuantity": {"value": 1.5, "code": "mg/dL"},
        },
        note | {
            "resourceType": "Observation",
            "code": {"coding": coding},
            "effectiveDateTime": "1931-07-23",
            "valueQuantity": {"value": 93, "unit": REPORT},
        },
        note | {
            "resourceType": "Observation",
            "code": {"coding": [{"code": "smoking"}]},
            "effectiveDateTime": "2024-05-06T10:00:00Z",
            "valueString": REPORT,
        },
        note | {
            "resourceType": "DiagnosticReport",
            "id": "Zebulon-MRN7744991",
            "identifier": [{"system": "acc", "value": "TRIAL-0099-X7731"}],
            "effectiveDateTime": "2024-05-06T12:00:00Z",
            "performer": [{"display": "Dr. Yxwander Krell"}],
            "presentedForm": [{"contentType": "text/plain", "data": data, "title": "Zebulon Quuxworth"}],
        },
        note | {
            "resourceType": "DiagnosticReport",
            "identifier": [{"system": "acc", "value": "ACCT5566778"}],
            "presentedForm": [{"contentType": "application/pdf", "data": data}],
        },
    ]  # fmt: skip
    lines = "\n".join(map(json.dumps, resources))
    (root / "Quuxworth Zebulon.ndjson").write_text(lines + "\n{torn " + REPORT.replace("\n", " "))
    (root / "MRN7744991.json").write_text("{" + REPORT)
    table = {
        "subject_id": pa.array([7744991] * 4, pa.int64()),
        "time": pa.array([datetime(1931, 7, 23), datetime(2024, 5, 6), datetime(2024, 5, 6), None], pa.timestamp("us")),
        "code": ["MEDS_BIRTH", "NOTE//Zebulon Quuxworth", "LAB//crea//MRN7744991", "GENDER//Yxwander Krell"],
        "numeric_value": pa.array([None, None, 1.0, None], pa.float32()),
        "text_value": [None, REPORT, REPORT, None],
    }
    pq.write_table(pa.table(table), root / "1931-07-23 Zebulon.parquet")
    (root / "Krell 078-05-1120.parquet").write_text(REPORT)
    fhir = {"files": ["*.ndjson", "*.json"], "patient_system": "mrn"}
    word = {"kind": "category", "vocabulary": ["F", "M"]}
    described = {
        "root": "exports",
        "key": {"file": "key"},
        "tables": {
            "people": {"resource": "Patient"} | fhir,
            "reports": {"resource": "DiagnosticReport", "study_system": "acc"} | fhir,
        },
        "events": {
            "chart": {"format": "fhir", "study_time": {"table": "reports", "column": "time"}} | fhir,
            "ehr": {
                "format": "meds",
                "files": ["*.parquet"],
                "study_time": {"table": "reports", "column": "time"},
                "unit_from_code": True,
            },
        },
        "texts": {"report": {"table": "reports", "column": "text"}},
        "columns": {
            "born": {"kind": "date", "table": "people", "column": "birth_date"},
            "seen": {"kind": "date", "table": "reports", "column": "time"},
            "gender": word | {"table": "people"},
            "crea": {
                "kind": "number",
                "unit": "mg/dL",
                "codes": ["loinc|2160-0"],
                "events": "chart",
                "window_days": [-1, 1],
            },
            "smoking": word | {"codes": ["smoking"], "events": "chart", "window_days": [-1, 1]},
            "age": {
                "kind": "number",
                "unit": "years",
                "codes": ["MEDS_BIRTH"],
                "take": "since",
                "events": "ehr",
                "window_days": [-99999, 0],
            },
            "note": word | {"codes": ["NOTE//*"], "events": "ehr", "window_days": [-1, 1]},
            "lab": {"kind": "number", "unit": "g", "codes": ["LAB*"], "events": "ehr", "window_days": [-1, 1]},
            "sex": word | {"codes": ["GENDER*"], "events": "ehr", "static": True},
        },
    }
    (tmp_path / "key").write_text("no one knows this key 0123456789")
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(described))
    return tmp_path


def test_none_of_them_leaves_fhir_or_meds(charted):
    command = [sys.executable, "-m", "mmfm_jax.cli", "ingest", "dataset.yaml", "--out", "made/store", "--workers", "1"]
    done = subprocess.run(command, cwd=charted, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    assert_clean(done.stdout + done.stderr, "the screen")
    assert_clean(everything(charted / "made"), "the store")
    store = StudyStore.open(str(charted / "made/store"))
    assert len(store) == 1
    texts, values, _ = store.table(0)
    assert "nodule of 7 mm is stable since [REMOVED]" in texts["report"][0]
    assert {name: values[name] for name in ("age", "crea")} == {"age": 90, "crea": 1.5} and set(values) == {
        "age", "crea", "seen",
    }  # fmt: skip
    rejects = pq.read_table(charted / "made/store/rejects.parquet").to_pylist()
    assert {(r["part"], r["reason"]) for r in rejects} == {
        ("", "damaged"),
        ("", "unsupported"),
        ("records", "damaged"),
        ("born", "over_89"),
        ("gender", "not_in_vocabulary"),
        ("smoking", "not_in_vocabulary"),
        ("note", "not_in_vocabulary"),
        ("lab", "unknown_unit"),
        ("sex", "not_in_vocabulary"),
    }
