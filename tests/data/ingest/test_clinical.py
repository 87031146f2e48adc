"""A hospital with a FHIR export and MEDS shards: reports, people and events meet their studies."""

import base64
import filecmp
import json
from datetime import datetime, timedelta

import meds
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfm_jax.data.store.study_store import StudyStore

pytest.importorskip("pydicom")
MRN, ACCESSION, LOINC, ICD = "urn:mrn", "urn:acc", "http://loinc.org", "icd"
CLOCK = datetime(2021, 3, 4, 15, 30)
"""Of every study of the hospital here, in the zone +01:00."""


def resources_of(patient: str, number: int) -> list[dict]:
    """A patient with two studies, as `hospital` admits them, and what FHIR says of them."""
    subject = {"reference": f"Patient/p{number}"}

    def lab(hours: float, value: float, **more) -> dict:
        time = (CLOCK + timedelta(hours=hours - 1)).isoformat() + "Z"
        quantity = {"value": value, "unit": "mg/dL"} | more
        coding = [{"system": LOINC, "code": "2160-0"}]
        return {
            "resourceType": "Observation", "status": "final", "subject": subject, "code": {"coding": coding},
            "effectiveDateTime": time, "valueQuantity": quantity,
        }  # fmt: skip

    reports = [
        {
            "resourceType": "DiagnosticReport", "status": "final", "subject": subject,
            "identifier": [{"system": ACCESSION, "value": f"ACC{2 * number + i}"}],
            "performer": [{"display": "Ingrid Vexler"}],
            "presentedForm": [{
                "contentType": "text/plain",
                "data": base64.b64encode(
                    f"FINDINGS: Nodule {number}{i}. Bertha Qwill lives in Xyzzyville, as Vexler wrote.".encode()
                ).decode(),
            }],
        }
        for i in range(2)
    ]  # fmt: skip
    return [
        {
            "resourceType": "Patient", "id": f"p{number}", "identifier": [{"system": MRN, "value": patient}],
            "gender": "female", "birthDate": "1960-01-01",
            "name": [{"family": "Qwill", "given": ["Bertha"]}], "address": [{"city": "Xyzzyville"}],
        },
        lab(-1, 1.0 + number),
        lab(0.5, 99),  # half an hour after the study
        lab(-24 * 40, 77),  # long before
        lab(-2, 5000, unit="furlong"),
        {
            "resourceType": "Condition", "subject": subject, "onsetDateTime": f"{2000 + 20 * number}-01-01",
            "code": {"coding": [{"system": ICD, "code": "J44.9"}]},
        },
        *reports,
    ]  # fmt: skip


@pytest.fixture
def charted(hospital):
    """Three patients; the third has no chart, and one chart is of a patient without a study."""
    for study in hospital.exports.glob("dicom/*/*"):
        import pydicom

        for path in study.iterdir():
            ds = pydicom.dcmread(path)
            ds.StudyDate, ds.StudyTime, ds.TimezoneOffsetFromUTC = "20210304", "153000.00", "+0100"
            ds.save_as(path)
    folder = hospital.exports / "fhir"
    folder.mkdir()
    first, second, stranger = (resources_of(f"MRN100{i}" if i < 2 else "NONE", i) for i in range(3))
    (folder / "one.json").write_text(
        json.dumps({"resourceType": "Bundle", "entry": [{"resource": one} for one in first]})
    )
    (folder / "two.ndjson").write_text("\n".join(map(json.dumps, second)))
    (folder / "three.ndjson").write_text("\n".join(map(json.dumps, stranger[:5])))
    (folder / "torn.json").write_text('{"resourceType": "Bund')
    source = {"files": ["fhir/*"], "patient_system": MRN}
    hospital.describe(
        {
            "tables": {
                "visits": {"file": "visits.csv", "patient": "mrn", "study": "accession"},
                "people": {"resource": "Patient"} | source,
                "reports": {"resource": "DiagnosticReport", "study_system": ACCESSION} | source,
            },
            "events": {"chart": {"format": "fhir", "study_time": {"image": "ct"}} | source},
            "images": {"ct": {"files": ["dicom/**"], "modality": "CT", "study_tag": "AccessionNumber"}},
            "texts": {"findings": {"table": "reports", "column": "text", "section": "findings"}},
            "columns": {
                "gender": {"kind": "category", "vocabulary": ["female", "male"], "table": "people"},
                "creatinine": {
                    "kind": "number", "unit": "mg/dL", "codes": [f"{LOINC}|2160-0"], "window_days": [-30, 0],
                },
                "copd": {
                    "kind": "category", "vocabulary": ["no", "yes"], "codes": [f"{ICD}|J44*"], "take": "any",
                    "window_days": [-3650, 0],
                },
            },
            "labels": {},
        }
    )  # fmt: skip
    return hospital


def test_fhir_reports_people_and_events_meet_the_images_they_are_of(charted, tmp_path):
    outcome = charted.ingest(tmp_path / "store")
    store = StudyStore.open(str(tmp_path / "store"))
    assert len(store) == 6  # the stranger has no study
    held = sorted((store.table(row) for row in range(6)), key=str)
    seen = [
        (
            {"findings": (f"Nodule {number}{i}. [REMOVED] [REMOVED] lives in [REMOVED], as [REMOVED] wrote.",)},
            {"gender": "female", "creatinine": 1.0 + number, "copd": "no" if number == 0 else "yes"},
            {},
        )
        for number in range(2)
        for i in range(2)
    ]
    none = [({}, {}, {})] * 2
    assert held == sorted([*seen, *none], key=str)
    for counts in outcome.counts.values():
        assert counts.inputs == counts.taken + counts.refused
    assert {s: (c.inputs, c.refused) for s, c in outcome.counts.items() if s != "images"} == {
        "events.chart": (4, 2),
        "tables.people": (4, 2),
        "tables.reports": (5, 1),
        "tables.visits": (6, 0),
    }
    assert sorted((r.source, r.part, r.reason, r.detail) for r in outcome.rejects if r.reason != "damaged") == [
        ("events.chart", "", "unmatched", "none of its patients has a study"),
        ("events.chart", "creatinine", "unknown_unit", "1 events"),
        ("events.chart", "creatinine", "unknown_unit", "1 events"),
        ("tables.people", "", "unmatched", "its patient has no study"),
    ]


def test_without_images_a_report_is_a_study_and_a_cohort_row_one(charted, tmp_path):
    events = [
        {"subject_id": 1, "time": None, "code": "GENDER//F", "numeric_value": None},
        {"subject_id": 1, "time": CLOCK - timedelta(days=1), "code": "LAB//crea//mg/dL", "numeric_value": 1.25},
        {"subject_id": 1, "time": CLOCK + timedelta(days=9), "code": "MEDS_DEATH", "numeric_value": None},
    ]
    (charted.exports / "data").mkdir()
    schema = pa.schema(
        [
            ("subject_id", pa.int64()),
            ("time", pa.timestamp("us")),
            ("code", pa.string()),
            ("numeric_value", pa.float32()),
        ]
    )
    pq.write_table(meds.DataSchema.align(pa.Table.from_pylist(events, schema)), charted.exports / "data/0.parquet")
    cohort = {"subject_id": [1, 2], "prediction_time": pa.array([CLOCK, CLOCK], pa.timestamp("us"))}
    pq.write_table(pa.table(cohort), charted.exports / "cohort.parquet")
    charted.describe(
        {
            "tables": {
                "cohort": {"file": "cohort.parquet", "patient": "subject_id", "study": "prediction_time"},
                "reports": {"resource": "DiagnosticReport", "files": ["fhir/one.json"], "patient_system": MRN},
            },
            "events": {
                "ehr": {
                    "format": "meds", "files": ["data/*"], "unit_from_code": True,
                    "study_time": {"table": "cohort", "column": "prediction_time"},
                }
            },
            "images": {},
            "texts": {"text": {"table": "reports"}},
            "columns": {
                "crea": {"kind": "number", "unit": "mg/dL", "codes": ["LAB//crea*"], "window_days": [-2, 0]},
                "sex": {
                    "kind": "category", "vocabulary": ["F"], "values": {"GENDER//F": "F"}, "codes": ["GENDER//*"],
                    "static": True,
                },
            },
            "labels": {
                "dead": {"classes": ["no", "yes"], "codes": ["MEDS_DEATH"], "take": "any", "window_days": [0, 30]},
            },
        }
    )  # fmt: skip
    for report in (one := json.loads((charted.exports / "fhir/one.json").read_text()))["entry"][-2:]:
        report["resource"]["id"] = report["resource"]["identifier"][0]["value"]
    (charted.exports / "fhir/one.json").write_text(json.dumps(one))
    outcome = charted.ingest(tmp_path / "store")
    store = StudyStore.open(str(tmp_path / "store"))
    held = [store.table(row) for row in range(len(store))]
    assert sorted(len(texts) for texts, _, _ in held) == [0, 1, 1]
    assert [(values, labels) for texts, values, labels in held if not texts] == [
        ({"crea": 1.25, "sex": "F"}, {"dead": 1})
    ]
    assert {(r.source, r.reason) for r in outcome.rejects} == {("tables.cohort", "empty_study")}
    charted.ingest(tmp_path / "again")
    same = filecmp.dircmp(tmp_path / "store", tmp_path / "again")
    assert (
        not same.diff_files
        and (tmp_path / "again/store.json").read_bytes() == (tmp_path / "store/store.json").read_bytes()
    )
