"""MEDS shards (https://github.com/Medical-Event-Data-Standard/meds, 0.3 and 0.4): Parquet, a row an event.

A row group is read at a time, and of it only rows whose code is wanted, so memory is bounded by the largest row group
however large the shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from mmfm_jax.data.readers.events import Event, EventFile, matches
from mmfm_jax.data.refuse import Refused

_NEEDED = {"subject_id": pa.types.is_integer, "time": pa.types.is_timestamp, "code": None}


def row_groups(path: Path, unit_column: str = "") -> int:
    """How many row groups a shard has. Raises Refused when it is none."""
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError):
        raise Refused("damaged", "it is not a Parquet file") from None
    for name in (*_NEEDED, *([unit_column] if unit_column else [])):
        if name not in schema.names:
            raise Refused("not_meds", f"it has no column {name}")
    for name, fits in _NEEDED.items():
        if fits is not None and not fits(schema.field(name).type):
            raise Refused("not_meds", f"its column {name} is of another type than MEDS says")
    return file.metadata.num_row_groups


def read_events(
    path: Path, group: int, wanted: Iterable[str], unit_column: str = "", unit_from_code: bool = False
) -> EventFile:
    """The events of one row group that have a wanted code; times are as its clock shows them when it says no zone.

    Raises Refused when it is damaged.
    """
    wanted = tuple(wanted)
    try:
        (fragment,) = ds.dataset(path, format="parquet").get_fragments()
        part = fragment.subset(row_group_ids=[group])
        names = part.physical_schema.names
        columns = ["subject_id", "time", "code", *(n for n in ("numeric_value", "text_value") if n in names)]
        columns += [unit_column] if unit_column else []
        index = part.to_table(columns=["subject_id", "code"])
        subjects = index.column("subject_id").unique().to_pylist()
        codes = [c for c in index.column("code").cast(pa.string()).unique().to_pylist() if c and matches(c, wanted)]
        of_wanted = pc.field("code").cast(pa.string()).isin(pa.array(codes, pa.string()))
        table = part.to_table(columns=list(dict.fromkeys(columns)), filter=of_wanted)
    except (pa.ArrowException, OSError):
        raise Refused("damaged", "a part of it cannot be read") from None
    found = EventFile(patients={str(subject) for subject in subjects if subject is not None})

    def column(name: str) -> list:
        return table.column(name).to_pylist() if name in table.column_names else [None] * len(table)

    values = column("numeric_value")
    if "numeric_value" in table.column_names and table.schema.field("numeric_value").type == pa.float32():
        values = table.column("numeric_value").to_numpy()  # 1.2 in 32 bits is 1.2, not 1.2000000476837158
        values = [None if value != value else float(str(value)) for value in values]
    times = table.column("time").cast(pa.timestamp("us", table.schema.field("time").type.tz)).to_pylist()
    rows = zip(column("subject_id"), times, column("code"), values, column("text_value"), column(unit_column))
    for subject, time, code_of, value, text, unit in rows:
        if subject is None:
            found.left_out["no_patient"] += 1
            continue
        unit = code_of.rpartition("//")[2] if unit_from_code and "//" in code_of else unit
        found.events.append(Event(str(subject), (code_of,), time, value, str(text or "").strip(), str(unit or "")))
    return found
