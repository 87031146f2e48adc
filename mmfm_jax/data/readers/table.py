"""Rows of CSV, TSV, JSONL and Parquet files as text, cell by cell."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

Row = dict[str, str]
_CELL_BYTES = 16 * 2**20
_BATCH_ROWS = 256  # of Parquet, where one long word may be told to repeat


def read_table(path: Path, name: str, columns: Iterable[str], encoding: str) -> Iterator[tuple[int, Row | Refused]]:
    """(number from 1, cells of `columns`) of every row; a row of another length than the header is Refused.

    Missing cells are empty text. `name` stands for the file in errors.
    Raises UserError when the file is no table, cannot be decoded, or lacks a column.
    """
    columns = list(dict.fromkeys(columns))
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet(path, name, columns)
        elif path.suffix.lower() == ".jsonl":
            yield from _jsonl(path, columns, encoding)
        else:
            yield from _csv(path, name, columns, encoding)
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such table; mend the path") from error
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{name}: is not {encoding} text; give its `encoding`") from error
    except (csv.Error, pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: cannot be read as a table ({type(error).__name__}); export it again") from error


def _require(name: str, columns: list[str], held: list[str]) -> None:
    for column in columns:
        if held.count(column) != 1:
            wrong = "has no column" if column not in held else "has twice the column"
            raise UserError(f"{name}: {wrong} {column}; mend the description or the table")


def _csv(path: Path, name: str, columns: list[str], encoding: str) -> Iterator[tuple[int, Row | Refused]]:
    csv.field_size_limit(_CELL_BYTES)
    with path.open(encoding=encoding, newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header = [cell.strip() for cell in next(rows, [])]
        _require(name, columns, header)
        at = {column: header.index(column) for column in columns}
        for number, row in enumerate(rows, start=1):
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                yield number, Refused("bad_row", f"it has {len(row)} cells and the table has {len(header)} columns")
            else:
                yield number, {column: row[i].strip() for column, i in at.items()}


def _jsonl(path: Path, columns: list[str], encoding: str) -> Iterator[tuple[int, Row | Refused]]:
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                held = json.loads(line)
                if not isinstance(held, dict):
                    raise ValueError
                yield number, {column: as_text(held.get(column)) for column in columns}
            except (ValueError, RecursionError, TypeError):
                yield number, Refused("bad_row", "it is not a JSON object of plain values")


def _parquet(path: Path, name: str, columns: list[str]) -> Iterator[tuple[int, Row | Refused]]:
    file = pq.ParquetFile(path)
    _require(name, columns, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(columns=columns, batch_size=_BATCH_ROWS):
        for row in batch.to_pylist():
            number += 1
            try:
                yield number, {column: as_text(row[column]) for column in columns}
            except TypeError:
                yield number, Refused("bad_row", "it holds lists or structures")


def as_text(value: object) -> str:
    """A cell as text: whole floats as integers, for identifiers that passed through a float column; None as empty.

    Raises TypeError for lists and structures.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, (list, dict, tuple, bytes)):
        raise TypeError
    return str(value).strip()
