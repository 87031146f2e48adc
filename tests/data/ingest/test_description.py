"""A description that is wrong is refused in one sentence, and the examples are right."""

import json
import os
from pathlib import Path

import pytest
import yaml

from mmfm_jax.cli import main
from mmfm_jax.data.ingest.load import load_dataset
from mmfm_jax.errors import UserError

pytest.importorskip("pydicom")
CONFIGS = Path(__file__).parents[3] / "configs" / "data"
WHOLE = {
    "tables": {"t": {"file": "t.csv", "patient": "mrn", "study": "acc", "identifiers": ["name"]}},
    "images": {"ct": {"files": ["ct/**"]}},
    "columns": {"age": {"kind": "number", "unit": "years"}},
}
EVENTS = {"kind": "number", "codes": ["x"], "window_days": [-1, 0]}


def with_(path: str, value) -> dict:
    changed = json.loads(json.dumps(WHOLE))
    *parents, last = path.split(".")
    place = changed
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("images.ct.files", ["../ct/**"], "images.ct.files: the pattern '../ct/\\*\\*' leaves the root"),
        ("images.ct.files", ["/data/**"], "leaves the root"),
        ("images.ct.files", [], "needs either files, or table and column"),
        ("images.ct.filez", ["a"], "images.ct.filez: is not a known field; did you mean files?"),
        ("images.ct.path", "(", "images.ct.path: is not a regular expression"),
        ("images.ct.path", "ct/(.*)", r"has no group for the patient"),
        ("images.ct.dtype", "int64", "images.ct.dtype"),
        ("images.ct.allow", ["faces"], "images.ct.allow"),
        ("images.ct/1", {"files": ["a"]}, "images"),
        ("tables.t.file", "../t.csv", "tables.t.file: leaves the root"),
        ("tables.t.file", "t.xlsx", "tables.t.file: is not a table"),
        ("columns.age.column", "mrn", "columns.age: the column mrn identifies patients"),
        ("columns.age.column", "name", "columns.age: the column name identifies patients"),
        ("columns.age.table", "u", "columns.age: there is no table u"),
        ("columns.sex", {"kind": "category"}, "columns.sex: a category, and nothing else, has a vocabulary"),
        ("columns.born", {"kind": "date", "relative_to": "age"}, "relative_to must name a date column"),
        ("columns.kvp", {"kind": "number", "image": "ct", "tag": "KPV"}, "columns.kvp.tag: KPV is not a DICOM keyword"),
        (
            "columns.id",
            {"kind": "category", "vocabulary": ["a"], "image": "ct", "tag": "PatientID"},
            "identifies people",
        ),
        ("columns.x", {"kind": "number", "image": "ct", "tag": "SeriesDescription"}, "which is no number"),
        ("images.ct.zzz", ["a"], "images.ct.zzz: is not a known field; `mmfm schema dataset` lists all"),
        ("columns.x", {"kind": "number", "image": "mr", "tag": "KVP"}, "there is no image role mr"),
        ("labels.y", {"classes": ["one"]}, "labels.y: needs at least two classes"),
        ("labels.y", {"classes": ["no", "yes"], "values": {"1": "ja"}}, "values must lead to them"),
        ("texts.r", {"files": ["*.txt"]}, "text files do not say whose they are"),
        ("texts.r", {"column": "x", "scrub": False, "presidio": "patterns"}, "presidio adds to scrub, which is off"),
        ("texts.r", {"column": "name"}, "texts.r: the column name identifies patients"),
        ("masks.m", {"image": "mr", "files": ["m/*"], "classes": ["a"]}, "masks.m: there is no image role mr"),
        ("masks.ct", {"image": "ct", "files": ["m/*"], "classes": ["a"]}, "masks.ct: an image role has this name"),
        ("masks.m", {"image": "ct", "files": ["m/*"], "classes": ["a", "a"]}, "masks.m: classes must differ"),
        (
            "masks.m",
            {"image": "ct", "files": ["m/*"], "classes": ["a"], "values": {"1": "b"}},
            "values must lead to them",
        ),
        ("masks.m", {"image": "ct", "classes": ["a"]}, "masks.m: needs either files, or table and column"),
        ("masks.m", {"image": "ct", "table": "u", "column": "c", "classes": ["a"]}, "masks.m: there is no table u"),
        ("masks.m", {"image": "ct", "files": ["m/*"], "classes": []}, "masks.m.classes"),
        ("split", {"fractions": {"train": 0.5}}, "split: fractions sum to 0.5"),
        ("split", {"column": "mrn"}, "split: the column mrn identifies patients"),
        ("key", {}, "key: needs either env or file"),
        ("tables.t.resource", "Patient", "tables.t: needs either file, or resource and files"),
        ("tables.p", {"resource": "Patient"}, "tables.p: resource and files go together"),
        ("tables.p", {"resource": "Patient", "files": ["../x"]}, "leaves the root"),
        ("tables.p", {"file": "t.csv"}, "tables.p: needs the column of the patient"),
        ("tables.p", {"file": "t.csv", "patient": "x", "study_system": "y"}, "are of FHIR resources"),
        ("events.e", {"format": "meds", "files": []}, "events.e.files"),
        ("events.e", {"format": "fhir", "files": ["a"], "unit_column": "u"}, "are of MEDS; FHIR states units"),
        ("events.e", {"format": "meds", "files": ["a"], "study_time": {}}, "either a table's column or an image role"),
        ("events.e", {"format": "meds", "files": ["a"], "study_time": {"image": "mr"}}, "there is no image role mr"),
        ("columns.x", EVENTS | {"codes": ["*"]}, "a code needs a beginning"),
        ("columns.x", EVENTS | {"codes": ["a*b"]}, "a code needs a beginning"),
        ("columns.x", EVENTS | {"window_days": None}, "needs window_days, such as"),
        ("columns.x", EVENTS | {"static": True}, "needs window_days, such as"),
        ("columns.x", EVENTS | {"window_days": [0, -1]}, "two numbers of days, the earlier first"),
        ("columns.x", EVENTS | {"take": "any"}, "a number of events cannot take any; it takes count, first"),
        ("columns.x", EVENTS | {"kind": "date"}, "a date of events cannot take last; it takes none"),
        ("columns.x", EVENTS | {"take": "since", "unit": "mg"}, "since needs a unit of time"),
        ("columns.x", EVENTS | {"take": "count", "unit": "mg"}, "a count has no unit"),
        ("columns.x", EVENTS | {"take": "count", "units": {"g": 1}}, "units are of numbers that take a value"),
        ("columns.x", EVENTS | {"column": "x"}, "needs either codes of events, image and tag, or a table's column"),
        ("columns.x", EVENTS, "columns.x: there are no events .* declare them under events"),
        ("columns.x", {"kind": "number", "take": "mean"}, "go with codes"),
        (
            "labels.y",
            {"classes": ["a", "b", "c"], "codes": ["x"], "take": "any", "static": True},
            "any needs two words",
        ),
    ],
)
def test_what_is_wrong(tmp_path, path, value, message):
    described = tmp_path / "dataset.yaml"
    described.write_text(yaml.safe_dump(WHOLE))
    load_dataset(described)
    described.write_text(yaml.safe_dump(with_(path, value)))
    with pytest.raises(UserError, match=message) as raised:
        load_dataset(described)
    assert str(described) in str(raised.value) and "\n" not in str(raised.value)


def test_windows_need_a_study_time(tmp_path):
    described = tmp_path / "dataset.yaml"
    source = {"events": {"e": {"format": "meds", "files": ["**"]}}}
    described.write_text(yaml.safe_dump(WHOLE | source | {"columns": {"x": EVENTS}}))
    with pytest.raises(UserError, match=r"columns.x: its events have no study_time to measure window_days from"):
        load_dataset(described)
    source["events"]["e"]["study_time"] = {"column": "name"}
    described.write_text(yaml.safe_dump(WHOLE | source | {"columns": {"x": EVENTS}}))
    load_dataset(described)


def test_exit_statuses(hospital, tmp_path, capsys):
    def run(*arguments) -> int:
        try:
            main([str(a) for a in arguments])
        except SystemExit as exit:
            return int(exit.code or 0)
        return 0

    out = ("--out", tmp_path / "store", "--workers", 1)
    assert run("ingest", tmp_path / "no.yaml", *out) == 2
    (hospital.folder / "key.txt").write_text("short")
    assert run("ingest", hospital.described, *out) == 2
    hospital.describe({"key": {"env": "MMFM_NO_SUCH_KEY"}})
    assert "MMFM_NO_SUCH_KEY" not in os.environ and run("ingest", hospital.described, *out) == 2
    hospital.describe({"root": "nowhere"})
    assert run("ingest", hospital.described, *out) == 2
    assert not (tmp_path / "store").exists()
    refusals = capsys.readouterr().err
    assert refusals.count("\n") == 4 and all(line.startswith("mmfm: ") for line in refusals.splitlines())
    hospital.describe({})
    (hospital.folder / "key.txt").write_text("a key of the tests, long enough")
    assert run("ingest", hospital.described, *out) == 0
    assert "6 studies of 3 patients" in capsys.readouterr().out
    (hospital.exports / "dicom/readme.txt").write_text("x")
    assert run("ingest", hospital.described, *out) == 2
    assert run("ingest", hospital.described, *out, "--append") == 3
    assert run("rejects", tmp_path / "store", hospital.described) == 0
    assert "dicom/readme.txt: unknown_format" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(path):
    load_dataset(path)


def test_the_committed_schema_is_current(capsys):
    main(["schema", "dataset"])
    committed = CONFIGS / "dataset.schema.json"
    assert committed.read_text() == capsys.readouterr().out, f"run: mmfm schema dataset > {committed.name}"


def test_a_language_model_that_is_not_there_stops_before_anything_is_read(hospital, tmp_path):
    hospital.describe({"texts": {"findings": {"column": "report", "presidio": "no_such_model"}}})
    with pytest.raises(UserError, match=r"presidio.* is not installed"):
        hospital.ingest(tmp_path / "store")
    assert list(tmp_path.iterdir()) == [hospital.folder]
