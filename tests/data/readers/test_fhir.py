"""FHIR resources give people, rows and events, however they are packed, and no file brings the reader down."""

import base64
import json
from datetime import date, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.readers import fhir
from mmfm_jax.data.refuse import Refused

MRN, ACCESSION, LOINC = "urn:example:mrn", "urn:example:accession", "http://loinc.org"


def patient(ident: str, mrn: str, **more) -> dict:
    return {"resourceType": "Patient", "id": ident, "identifier": [{"system": MRN, "value": mrn}]} | more


def observation(subject: str, code: str = "2160-0", **more) -> dict:
    return {
        "resourceType": "Observation",
        "status": "final",
        "subject": {"reference": subject},
        "code": {"coding": [{"system": LOINC, "code": code}]},
    } | more


def bundle(resources: list[dict]) -> dict:
    return {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": one} for one in resources]}


def write(path, resources: list[dict]):
    if path.suffix == ".ndjson":
        path.write_text("".join(json.dumps(one) + "\n" for one in resources))
    else:
        path.write_text(json.dumps(bundle(resources)))
    return path


def test_people_are_found_by_every_kind_of_reference(tmp_path):
    held = bundle([patient("a", "M1")])
    held["entry"][0]["fullUrl"] = "urn:uuid:0000-1"
    (tmp_path / "b.json").write_text(json.dumps(held))
    write(tmp_path / "p.ndjson", [patient("b", "M2"), {"resourceType": "Patient", "id": "c"}])
    who = fhir.people([tmp_path / "b.json", tmp_path / "p.ndjson", tmp_path / "none.json"], MRN)

    def of(reference: str) -> str:
        return who.of(fhir.about({"resourceType": "Observation", "subject": {"reference": reference}}))

    assert of("Patient/a") == of("https://x.example/fhir/Patient/a") == of("urn:uuid:0000-1") == "M1"
    assert of("Patient/b/_history/3") == "M2"
    assert of("Patient/c") == of("Patient/d") == of("Group/b") == of("") == ""
    plain = fhir.people([tmp_path / "p.ndjson"], "")
    assert plain.of("Patient/b") == "b" and plain.of("Patient/unheard-of") == "unheard-of"


def test_one_reference_of_two_people_is_of_neither(tmp_path):
    paths = [write(tmp_path / f"{i}.json", [patient("1", f"M{i}")]) for i in range(2)]
    assert fhir.people(paths, MRN).of("Patient/1") == ""
    assert fhir.people(paths[:1] * 2, MRN).of("Patient/1") == "M0"


def attachment(text: str, charset: str = "utf-8", kind: str = "text/plain") -> dict:
    return {"contentType": f"{kind}; charset={charset}", "data": base64.b64encode(text.encode(charset)).decode()}


def rows_of(tmp_path, *reports: dict) -> list:
    path = write(tmp_path / "r.ndjson", [patient("a", "M1"), *reports])
    return list(fhir.rows(path, "DiagnosticReport", fhir.people([path], MRN), ACCESSION))


def report(**more) -> dict:
    return {
        "resourceType": "DiagnosticReport",
        "status": "final",
        "subject": {"reference": "Patient/a"},
        "identifier": [{"system": "other", "value": "x"}, {"system": ACCESSION, "value": "ACC1"}],
        "code": {"coding": [{"system": LOINC, "code": "24627-2"}]},
        "effectiveDateTime": "2021-03-04T10:00:00+01:00",
    } | more


def test_reports_are_rows_with_the_text_of_their_attachments(tmp_path):
    forms = [attachment("Befund: Rundherd, 7 mm; naïve.", "latin-1"), attachment("Zweiter Teil.\n"), {"url": "x"}]
    made = rows_of(
        tmp_path,
        report(presentedForm=forms, conclusion=" Benign. "),
        report(presentedForm=[attachment("%PDF", kind="application/pdf")]),
        report(presentedForm=[attachment("%PDF", kind="application/pdf")], conclusion="Benign."),
        report(presentedForm=[{"contentType": "text/plain", "data": "no base64!"}]),
        report(status="entered-in-error"),
        report(identifier=[], presentedForm=[attachment("x")]),
    )
    assert made[0] == {
        "patient": "M1",
        "study": "ACC1",
        "time": "2021-03-04T10:00:00+01:00",
        "code": f"{LOINC}|24627-2",
        "text": "Befund: Rundherd, 7 mm; naïve.\n\nZweiter Teil.",
        "conclusion": "Benign.",
    }
    assert [one.reason for one in made if isinstance(one, Refused)] == ["unsupported", "damaged", "withdrawn"]
    assert made[2]["conclusion"] == "Benign." and made[2]["text"] == "" and made[5]["study"] == ""


def test_patients_are_rows(tmp_path):
    held = [
        patient("a", "M1", gender="female", birthDate="1950-02-03", deceasedDateTime="2020-01-01"),
        patient("b", "M2", deceasedBoolean=False),
        patient("c", "M3"),
    ]
    path = write(tmp_path / "p.json", held)
    made = list(fhir.rows(path, "Patient", fhir.people([path], MRN), ""))
    assert made == [
        {"patient": "M1", "birth_date": "1950-02-03", "gender": "female", "deceased": "true"},
        {"patient": "M2", "birth_date": "", "gender": "", "deceased": "false"},
        {"patient": "M3", "birth_date": "", "gender": "", "deceased": ""},
    ]


def read(tmp_path, resources: list[dict], wanted: tuple[str, ...] = ("*",)):
    return fhir.read_events(write(tmp_path / "e.ndjson", resources), wanted)


@pytest.mark.parametrize(
    ("value", "number", "text", "unit"),
    [
        ({"valueQuantity": {"value": 1.5, "unit": "mg per dl", "code": "mg/dL"}}, 1.5, "", "mg/dL"),
        ({"valueQuantity": {"value": 2, "unit": "mg"}}, 2.0, "", "mg"),
        ({"valueQuantity": {"value": 2, "comparator": "<", "code": "mg"}}, None, "", "mg"),
        ({"valueQuantity": {"value": True, "code": "mg"}}, None, "", "mg"),
        ({"valueInteger": 10**400}, None, "", ""),
        ({"valueInteger": 3}, 3.0, "", ""),
        ({"valueBoolean": True}, None, "true", ""),
        ({"valueString": "positive"}, None, "positive", ""),
        ({"valueCodeableConcept": {"coding": [{"system": "s", "code": "LA1"}], "text": "t"}}, None, "LA1", ""),
        ({"valueCodeableConcept": {"text": "t"}}, None, "t", ""),
        ({}, None, "", ""),
    ],
)
def test_values(tmp_path, value, number, text, unit):
    (event,) = read(tmp_path, [observation("Patient/a", **value)], ("2160-0",)).events
    assert (event.value, event.text, event.unit) == (number, text, unit)


def test_components_conditions_and_what_does_not_hold(tmp_path):
    pressure = [
        {"code": {"coding": [{"system": LOINC, "code": code}]}, "valueQuantity": {"value": value, "code": "mm[Hg]"}}
        for code, value in (("8480-6", 120), ("8462-4", 80))
    ]
    condition = {
        "resourceType": "Condition",
        "subject": {"reference": "Patient/a"},
        "code": {"coding": [{"system": "icd", "code": "I10"}]},
        "onsetPeriod": {"start": "2019-05-06"},
    }
    refuted = condition | {"verificationStatus": {"coding": [{"system": "v", "code": "refuted"}]}}
    found = read(
        tmp_path,
        [
            observation("Patient/a", "85354-9", component=pressure, effectiveDateTime="2020-01-02T03:04:05Z"),
            condition,
            refuted,
            observation("Patient/a", "8480-6", status="entered-in-error"),
            observation("Group/x", "8462-4"),
            observation("Patient/b", "not-wanted"),
        ],
        (f"{LOINC}|8480-6", "8462-4", "I1*"),
    )
    assert [(e.codes[1], e.time, e.value) for e in found.events[:2]] == [
        ("8480-6", datetime.fromisoformat("2020-01-02T03:04:05+00:00"), 120.0),
        ("8462-4", datetime.fromisoformat("2020-01-02T03:04:05+00:00"), 80.0),
    ]
    assert found.events[2].time == date(2019, 5, 6) and found.left_out == {"withdrawn": 2}
    assert found.patients == {"Patient/a", "Patient/b", "Group/x"}


times = st.one_of(
    st.none(),
    st.just("2020"),
    st.dates(date(2019, 1, 1), date(2021, 1, 1)).map(str),
    st.builds(
        lambda t, hours: t.replace(microsecond=0, tzinfo=timezone(timedelta(hours=hours))).isoformat(),
        st.datetimes(datetime(2019, 1, 1), datetime(2021, 1, 1)),
        st.integers(-12, 14),
    ),
)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y"]), times, st.integers(0, 9)), max_size=12))
def test_ndjson_and_bundles_give_the_same_events_in_order(tmp_path_factory, held):
    made = [
        observation(
            f"Patient/{who}",
            code,
            valueQuantity={"value": value, "code": "u"},
            **({"effectiveDateTime": t} if t else {}),
        )
        for who, code, t, value in held
    ]
    folder = tmp_path_factory.mktemp("fhir")
    a, b = (fhir.read_events(write(folder / name, made), ("x",)) for name in ("a.ndjson", "b.json"))
    assert a == b and a.patients == {f"Patient/{who}" for who, *_ in held}

    def placed(text):
        if text is None or text == "2020":
            return None
        return date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text)

    expected = [(f"Patient/{who}", placed(t), float(value)) for who, code, t, value in held if code == "x"]
    assert [(e.patient, e.time, e.value) for e in a.events] == expected


def test_files_that_are_none_are_refused_and_a_bad_line_costs_itself(tmp_path):
    for name, data in (("a.json", b"{"), ("b.json", b"[" * 100_000), ("c.json", b"\xff\xfe"), ("d.json", b"{}")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match="damaged"):
            fhir.read_events(tmp_path / name, ("x",))
    path = write(tmp_path / "e.ndjson", [observation("Patient/a", "x")])
    path.write_bytes(b"{torn\n\n" + path.read_bytes() + b'"x"\n')
    found = fhir.read_events(path, ("x",))
    assert len(found.events) == 1 and found.left_out == {"damaged": 2}


KEYS = [
    "resourceType", "id", "identifier", "system", "value", "subject", "reference", "code", "coding", "status", "entry",
    "resource", "fullUrl", "name", "family", "given", "telecom", "address", "contact", "component", "valueQuantity",
    "valueCodeableConcept", "valueInteger", "valueString", "comparator", "unit", "effectiveDateTime", "effectivePeriod",
    "start", "verificationStatus", "presentedForm", "contentType", "data", "conclusion", "performer", "display",
    "birthDate", "deceasedBoolean",
]  # fmt: skip
words = st.sampled_from(
    [
        "Patient",
        "Observation",
        "Condition",
        "DiagnosticReport",
        "Bundle",
        "Patient/1",
        "text/plain",
        "2020-01-01",
        "",
        "x",
    ]
)
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words)
anything = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner)),
    max_leaves=12,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(KEYS), anything), words)
def test_no_resource_brings_the_reader_down(tmp_path_factory, held, kind):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(bundle([held | {"resourceType": kind}, patient("1", "M")])))
    who = fhir.people([path], "")
    for resource in ("Patient", "DiagnosticReport"):
        for row in fhir.rows(path, resource, who, ""):
            assert isinstance(row, Refused) or all(isinstance(cell, str) for cell in row.values())
    fhir.read_events(path, ("*x", "x*"))
