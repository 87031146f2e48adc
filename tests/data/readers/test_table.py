"""Tables come cell by cell, the same from every format, and a bad row is one bad row."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfm_jax.data.readers.table import read_table
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

ROWS = [
    {"id": "007", "age": "61.5", "note": 'two\nlines, "quoted"'},
    {"id": "8", "age": "", "note": "naïve"},
]


def read(path, columns=("id", "note", "age"), encoding="utf-8-sig"):
    return list(read_table(path, "the table", columns, encoding))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_cells(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([r | {"more": [1]} for r in ROWS]), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(r | {"more": [1]}) for r in ROWS) + "\n\n")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["more", *ROWS[0]], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows({"more": "x"} | r for r in ROWS)
    assert read(path) == [(1, ROWS[0]), (2, ROWS[1])]


def test_typed_cells_of_parquet(tmp_path):
    import datetime

    table = pa.table(
        {
            "id": pa.array([12.0, None]),  # what pandas makes of integers with a gap
            "note": pa.array([True, None]),
            "age": pa.array([datetime.date(2020, 1, 2), None]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == [
        (1, {"id": "12", "note": "true", "age": "2020-01-02"}),
        (2, {"id": "", "note": "", "age": ""}),
    ]


def test_a_bad_row_is_one_bad_row(tmp_path):
    (tmp_path / "t.csv").write_text("id,note,age\n1,a,2\n2,b\n3,c,4,5\n\n4,d,6\n")
    (tmp_path / "t.jsonl").write_text('{"id": 1}\n[2]\n{"id": {"deep": 3}}\n{"id"\n{"id": "4"}\n')
    for path, good in ((tmp_path / "t.csv", {1, 4, 5}), (tmp_path / "t.jsonl", {1, 5})):
        rows = dict(read(path))
        assert {n for n, row in rows.items() if not isinstance(row, Refused)} <= good | {4}
        assert all(row.reason == "bad_row" for row in rows.values() if isinstance(row, Refused))
        assert sum(isinstance(row, Refused) for row in rows.values()) == (2 if path.suffix == ".csv" else 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,age\n1,2\n", "has no column note"),
        (b"id,age,note,note\n1,2,3,4\n", "has twice the column note"),
        (b"id,age,note\n1,2,\xff\n", "encoding"),
        (b'id,age,note\n1,2,"open\n', "cannot be read as a table"),
    ],
)
def test_what_is_no_table(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a table"):
        read(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="there is no such table"):
        read(tmp_path / "no.csv")
