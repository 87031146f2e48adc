"""Columns of events are what plain loops over the events give, whatever their order, files, times and units."""

import io
import itertools
import math
from datetime import datetime, timedelta
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from mmfm_jax.data.deid.identifiers import Hider
from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.data.ingest.events import add_events
from mmfm_jax.data.ingest.inputs import look_at
from mmfm_jax.data.ingest.ledger import Ledger
from mmfm_jax.data.ingest.pool import Pool
from mmfm_jax.data.ingest.studies import Joined, TableRow
from mmfm_jax.data.refuse import Refused

WINDOW = [-10.0, 0.0]
FIELDS = {
    **{take: {"kind": "number", "unit": "mg/dL", "take": take} for take in ("last", "first", "mean", "min", "max")},
    "count": {"kind": "number", "take": "count"},
    "since": {"kind": "number", "unit": "days", "take": "since"},
    "any": {"kind": "category", "vocabulary": ["no", "yes"], "take": "any"},
}
CODES = ["LAB//crea", "LAB//crea//serum", "LAB//other", "ICD//I10"]


class Here:
    """The pool's work in this process, its results in an order of their own."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng

    def run(self, function, tasks):
        results = []
        for index, task in enumerate(tasks):
            try:
                results.append((index, function(task)))
            except Refused as why:
                results.append((index, why))
        for at in self._rng.permutation(len(results)):
            yield results[at]


def shard(path: Path, events: list[tuple], **more) -> None:
    """A MEDS shard of (subject, time, code, value, unit, text), checked by the package of the standard."""
    subject, time, code, value, unit, text = zip(*events) if events else ((),) * 6
    table = pa.table(
        {
            "subject_id": pa.array(subject, pa.int64()),
            "time": pa.array(time, pa.timestamp("us")),
            "code": pa.array(code, pa.string()),
            "numeric_value": pa.array(value, pa.float32()),
            "text_value": pa.array(text, pa.large_string()),
            "unit": pa.array(unit, pa.string()),
        }
    )
    meds.DataSchema.validate(table)
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(table, path, row_group_size=3, **more)


def taken(folder: Path, described: dict, times: dict[tuple[str, str], str], seed: int = 0):
    """(studies with their values, ledger) of the shards below a folder; `times` of studies by patient and study."""
    dataset = Dataset.model_validate(described)
    ledger = Ledger(Hider("a key of the tests"))
    joined = [
        Joined(owner, rows=[TableRow("t", "t.csv", i, owner, {"when": when})])
        for i, (owner, when) in enumerate(times.items(), 1)
    ]
    files = [look_at(folder, str(p.relative_to(folder))) for p in sorted(folder.rglob("*.parquet"))]
    pool: Pool = Here(np.random.default_rng(seed))  # pyright: ignore[reportAssignmentType]
    progress = Progress(console=Console(file=io.StringIO()))
    add_events(dataset, "ehr", folder, files, None, joined, ledger, pool, progress)
    return joined, ledger


def described(**columns) -> dict:
    fields = columns or {
        name: {"codes": ["LAB//crea*"], "window_days": WINDOW, "units": {"umol/L": 0.0113}} | spec
        for name, spec in FIELDS.items()
    }
    for spec in fields.values():
        if spec.get("take", "last") in ("count", "since", "any") or spec["kind"] != "number":
            spec.pop("units", None)
    return {
        "tables": {"t": {"file": "t.csv", "patient": "p", "study": "s"}},
        "events": {"ehr": {"format": "meds", "files": ["**"], "study_time": {"column": "when"}, "unit_column": "unit"}},
        "columns": fields,
    }


START = datetime(2020, 1, 1)
DAYS = 15
stream = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.one_of(st.none(), st.integers(0, DAYS * 24).map(lambda hours: START + timedelta(hours=hours))),
        st.sampled_from(CODES),
        st.one_of(st.none(), st.integers(1, 5000).map(lambda tenths: tenths / 10)),
        st.sampled_from(["mg/dL", "mg/dL", "umol/L", "furlong", None]),
        st.none(),
    ),
    min_size=5,
    max_size=40,
)
studies_at = st.dictionaries(
    st.tuples(st.sampled_from(["1", "2", "3", "9"]), st.sampled_from("ab")),
    st.one_of(
        st.integers(0, DAYS * 24).map(lambda hours: (START + timedelta(hours=hours)).isoformat()),
        st.integers(0, DAYS).map(lambda days: (START + timedelta(days=days)).date().isoformat()),
        st.just(""),
    ),
    min_size=1,
)


def expected(events: list[tuple], patient: str, when: str) -> dict:
    """By a loop over the patient's events; values of events whose unit or number will not do count for nothing."""
    if not when:
        return {}
    own = [event for event in events if str(event[0]) == patient]
    inside, numbers = [], []
    for _, time, code, value, unit, _ in own:
        if time is None or not code.startswith("LAB//crea"):
            continue
        if "T" in when:
            days = (time - datetime.fromisoformat(when)).total_seconds() / 86400
        else:
            days = float((time.date() - datetime.fromisoformat(when).date()).days)
        if WINDOW[0] <= days <= WINDOW[1]:
            inside.append(days)
            if value is not None and unit in ("mg/dL", "umol/L"):
                exact = float(str(np.float32(value)))
                numbers.append((days, exact if unit == "mg/dL" else exact * 0.0113))
    made: dict = {}
    if numbers:
        values = [value for _, value in numbers]
        made |= {"min": min(values), "max": max(values), "mean": math.fsum(values) / len(values)}
        for name, at in (("last", max(numbers)[0]), ("first", min(numbers)[0])):
            there = {value for days, value in numbers if days == at}
            if len(there) == 1:
                made[name] = there.pop()
    if inside:
        made["since"] = pytest.approx(-max(inside))
    if own:
        made |= {"count": float(len(inside)), "any": "yes" if inside else "no"}
    return made


@settings(max_examples=60)
@given(stream, studies_at, st.integers(0, 2**31))
def test_random_streams(tmp_path_factory, events, times, seed):
    folder = tmp_path_factory.mktemp("meds")
    for part in (0, 1):  # MEDS keeps a subject in one shard, in the order of time
        held = [e for e in events if e[0] % 2 == part]
        shard(folder / f"data/{part}.parquet", sorted(held, key=lambda e: (e[0], e[1] or datetime.min)))
    joined, ledger = taken(folder, described(), times, seed)
    for study in joined:
        assert study.values == expected(events, study.owner[0], times[study.owner]), study.owner
    counts = ledger.counts()["events.ehr"]
    assert counts.inputs == 2 and counts.taken + counts.refused == 2
    again, _ = taken(folder, described(), times, seed + 1)
    assert [s.values for s in again] == [s.values for s in joined]


def test_means_do_not_depend_on_the_order_and_both_ends_of_a_window_are_in_it(tmp_path):
    rng = np.random.default_rng()
    values = np.exp(rng.normal(0, 5, 200)).astype(np.float32)
    hours = [-240.0, 0.0, *rng.uniform(-240, 0, 198).round(2), -240.01, 0.01]
    events = [lab(1, h, float(v)) for h, v in zip(hours, [*values, 1.0, 1.0])]
    shard(tmp_path / "a.parquet", events)
    times = {("1", "a"): START.isoformat()}
    made = [taken(tmp_path, described(), times, seed)[0][0].values for seed in range(3)]
    assert made[0]["count"] == 200
    exact = math.fsum(float(str(value)) for value in values) / 200
    assert made[0]["mean"] == made[1]["mean"] == made[2]["mean"] == exact


def lab(
    subject: int,
    hours: float | None,
    value: float | None = 1.0,
    unit: str | None = "mg/dL",
    code: str = CODES[0],
    text=None,
):
    return subject, None if hours is None else START + timedelta(hours=hours), code, value, unit, text


def left_out(ledger: Ledger) -> dict[tuple[str, str], str]:
    return {(reject.part, reject.reason): reject.detail for reject in ledger.rejects}


def test_what_is_left_out_is_counted_by_column_and_reason(tmp_path):
    events = [
        lab(1, None),
        lab(1, 1, unit="furlong"),
        lab(1, 2, unit=None),
        lab(1, 3, value=None),
        lab(1, 3.5, value=math.inf),
        lab(1, 4, 5.0),
        lab(1, 4, 6.0),
        lab(1, 1000, unit="furlong"),  # outside of the window: nobody asks
        lab(2, 1, unit="furlong"),  # of no study
    ]
    shard(tmp_path / "a.parquet", events)
    shard(tmp_path / "b.parquet", [lab(7, 1)])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"subject_id": [1], "code": ["x"]}), tmp_path / "d.parquet")
    last = described(last={"kind": "number", "unit": "mg/dL", "codes": ["LAB//crea"], "window_days": WINDOW})
    (study,), ledger = taken(tmp_path, last, {("1", "a"): "2020-01-01T05:00"})
    assert study.values == {}
    assert left_out(ledger) == {
        ("last", "no_time"): "1 events",
        ("last", "unknown_unit"): "2 events",
        ("last", "not_a_number"): "2 events",
        ("last", "same_time"): "in 1 studies",
        ("", "unmatched"): "none of its patients has a study",
        ("", "damaged"): "it is not a Parquet file",
        ("", "not_meds"): "it has no column time",
    }
    counts = ledger.counts()["events.ehr"]
    assert (counts.inputs, counts.taken, counts.refused) == (4, 1, 3)
    last["columns"]["last"]["units"] = {"": 1.0, "furlong": 2.0}
    last["columns"]["last"]["take"] = "max"
    (study,), ledger = taken(tmp_path, last, {("1", "a"): "2020-01-01T05:00"})
    assert study.values == {"last": 6.0}


def test_a_damaged_part_of_a_shard_refuses_the_shard_so_that_no_count_is_too_low(tmp_path):
    shard(tmp_path / "a.parquet", [lab(1, i, float(i + 1)) for i in range(9)], compression="none")
    times = {("1", "a"): "2020-01-02"}
    (whole,), _ = taken(tmp_path, described(), times)
    assert whole.values["count"] == 9
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    footer = pq.read_metadata(tmp_path / "a.parquet")
    at = footer.row_group(2).column(2)
    start = at.dictionary_page_offset or at.data_page_offset
    data[start : start + at.total_compressed_size] = b"\xff" * at.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(data)
    (study,), ledger = taken(tmp_path, described(), times)
    assert study.values == {} and list(left_out(ledger)) == [("", "damaged")]


def test_static_birth_and_words(tmp_path):
    events = [
        lab(1, None, None, None, "GENDER//F"),
        (1, datetime(1950, 1, 1), "MEDS_BIRTH", None, None, None),
        lab(1, 0, None, None, "SMOKING", "Former smoker"),
        lab(1, 1, None, None, "SMOKING", "a word that is not declared"),
        lab(1, 24 * 20, None, None, "MEDS_DEATH"),
        (2, datetime(1900, 1, 1), "MEDS_BIRTH", None, None, None),
        lab(2, None, None, None, "GENDER//X"),
    ]
    shard(tmp_path / "a.parquet", events)
    sex = {"kind": "category", "vocabulary": ["female", "male"], "values": {"GENDER//F": "female"}}
    asked = described(
        sex=sex | {"codes": ["GENDER//*"], "static": True},
        age={"kind": "number", "unit": "years", "codes": ["MEDS_BIRTH"], "take": "since", "window_days": [-60000, 0]},
        smoking={
            "kind": "category",
            "vocabulary": ["never", "former"],
            "values": {"Former smoker": "former"},
            "codes": ["SMOKING"],
            "take": "first",
            "window_days": [-1, 30],
        },
    )
    asked["labels"] = {
        "dead": {"classes": ["no", "yes"], "codes": ["MEDS_DEATH"], "take": "any", "window_days": [0, 30]}
    }
    times = {("1", "a"): "2020-01-01", ("2", "b"): "20200101120000"}
    (one, two), ledger = taken(tmp_path, asked, times)
    assert one.values == {"sex": "female", "smoking": "former", "age": pytest.approx(25567 / 365.2425)}
    assert one.labels == {"dead": 1} and two.labels == {"dead": 0}
    assert two.values == {"age": 90.0}  # 119 years are one class with 90
    assert left_out(ledger) == {("smoking", "not_in_vocabulary"): "1 events", ("sex", "not_in_vocabulary"): "1 events"}
    assert "GENDER//X" not in str(ledger.rejects) and "a word" not in str(ledger.rejects)


def test_units_in_codes(tmp_path):
    codes = ["LAB//crea//mg/dL", "LAB//crea//umol/L", "LAB//crea//"]
    shard(tmp_path / "a.parquet", [lab(1, i, 100.0, None, code) for i, code in enumerate(codes)])
    asked = described(crea={"kind": "number", "unit": "mg/dL", "codes": ["LAB//crea*"], "window_days": WINDOW})
    asked["columns"]["crea"] |= {"take": "min", "units": {"umol/L": 0.0113}}
    source = asked["events"]["ehr"]
    del source["unit_column"]
    source["unit_from_code"] = True
    (study,), ledger = taken(tmp_path, asked, {("1", "a"): "2020-01-02"})
    assert study.values == {"crea": pytest.approx(1.13)}
    assert left_out(ledger) == {("crea", "unknown_unit"): "1 events"}


def test_studies_without_a_time_or_with_two_have_no_columns_of_events(tmp_path):
    shard(tmp_path / "a.parquet", [lab(1, 0)])
    times = {("1", study): when for study, when in zip("abc", ["2020-01-01", "", "last week"])}
    (a, b, c), ledger = taken(tmp_path, described(), times)
    assert a.values["count"] == 1 and b.values == c.values == {}
    assert left_out(ledger) == {("events.ehr", "not_a_date"): "the time of the study is not a date to the day"}
    assert list(itertools.chain(*(r.detail for r in ledger.rejects if "last week" in r.detail))) == []
