"""Studies without their voxels as Parquet: how they are encoded, and read back by whole columns or row groups."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts

from mmfm_jax.data import parquet
from mmfm_jax.data.parquet import first_byte
from mmfm_jax.data.store.bounded import BytesCache
from mmfm_jax.data.store.format import GROUP_STUDIES, PART_STUDIES, local_folder
from mmfm_jax.data.store.masks import MaskSummary
from mmfm_jax.data.study import Schema, Study
from mmfm_jax.errors import UserError

INDEX_SCHEMA = pa.schema([("patient", pa.string()), ("share", pa.uint32()), ("split", pa.string())])
GROUPS_BYTES, FOOTERS_BYTES = 32 * 2**20, 128 * 2**20
_CHUNK_BYTES = 700  # of a parsed footer, for each column of each row group
_TAIL_BYTES = 64 * 2**10  # read first of a part of the index: its footer, and the splits before that


def part_name(table: str, part: int) -> str:
    return f"{table}.parquet/{part:05d}.parquet"


def arrow_schema(schema: Schema) -> pa.Schema:
    """Columns of `studies.parquet`. A missing part is null."""
    fields = [INDEX_SCHEMA.field("patient"), INDEX_SCHEMA.field("split")]
    for role, image in schema.images.items():
        fields.append(pa.field(f"image/{role}/spacing_mm", pa.list_(pa.float64())))
        if image.shape is None:
            fields.append(pa.field(f"image/{role}/shape", pa.list_(pa.int32())))
            fields.append(pa.field(f"image/{role}/sha256", pa.string()))
    fields += [pa.field(f"text/{name}", pa.list_(pa.string())) for name in schema.texts]
    for name, column in schema.columns.items():
        fields.append(pa.field(f"column/{name}", pa.float64() if column.kind == "number" else pa.string()))
    fields += [pa.field(f"label/{name}", pa.string()) for name in schema.labels]
    fields += [pa.field(f"mask/{name}/voxels", pa.list_(pa.int64())) for name in schema.masks]
    return pa.schema(fields)


def encode(study: Study, schema: Schema, checksums: dict[str, str], masks: dict[str, MaskSummary]) -> dict:
    """One row of `studies.parquet`; `checksums` are of the study's volumes by role, `masks` of its masks."""
    row: dict = {"patient": study.patient, "split": study.split}
    for role, image in study.images.items():
        row[f"image/{role}/spacing_mm"] = [float(s) for s in image.spacing_mm]
        if role in checksums:
            row[f"image/{role}/shape"] = list(image.voxels.shape[:3])
            row[f"image/{role}/sha256"] = checksums[role]
    row |= {f"text/{name}": list(texts) for name, texts in study.texts.items() if texts}
    row |= {f"column/{name}": value for name, value in study.row.items()}
    row |= {f"label/{name}": schema.labels[name].classes[value] for name, value in study.labels.items()}
    row |= {f"mask/{name}/voxels": mask.voxels.tolist() for name, mask in masks.items()}
    return row


def write_part(batches: Sequence[pa.RecordBatch], group: int) -> bytes:
    """A Parquet file of the rows of `batches` in row groups of `group`."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_batches(batches), sink, row_group_size=group, compression="zstd")
    return sink.getvalue()


class StudyTables:
    """The Parquet tables of a store.

    Safe to use from many threads. Memory: `GROUPS_BYTES` of row groups and `FOOTERS_BYTES` of footers are kept.
    """

    def __init__(self, kvstore: ts.KvStore, url: str, schema: Schema, studies: int):
        self._kvstore, self._url, self._studies = kvstore, url, studies
        self._schema, self._folder = arrow_schema(schema), local_folder(url)
        self._footers = BytesCache(FOOTERS_BYTES, lambda f: _CHUNK_BYTES * f.num_row_groups * f.num_columns)
        self._groups = BytesCache(GROUPS_BYTES, lambda batch: batch.nbytes)

    def get(self, row: int, columns: tuple[str, ...]) -> dict:
        """Values of `columns` at a row; missing ones are None. For stores without records: it reads a row group."""
        part, at = divmod(row, PART_STUDIES)
        group, at = divmod(at, GROUP_STUDIES)
        batch = self._groups.made((part, group), lambda: self.read_group(part, group))
        return {name: batch.column(name)[at].as_py() for name in columns}

    def whole_part(self, part: int, columns: list[str]) -> pa.Table:
        """`columns` of every row of one part of the studies."""
        name = part_name("studies", part)
        try:
            return parquet.read(self._read(name, slice(None)), self._schema, columns)
        except ValueError as error:
            raise self._damaged(name) from error

    def index(self, part: int, columns: list[str]) -> pa.Table:
        """`columns` of one part of the index, of which no more is read than the file from the first of them on.

        A split is a dictionary of few words, and not a string a study.
        """
        name = part_name("index", part)
        try:
            tail = self._kvstore.read(name, byte_range=slice(-_TAIL_BYTES, None)).result().value
        except ValueError:  # it is shorter than that, or cannot be read, as is said next
            tail = self._read(name, slice(None))
        try:
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if length > len(tail):
                tail = self._read(name, slice(-length, None))
            footer = pq.read_metadata(pa.BufferReader(tail))
            if footer.num_rows != min(PART_STUDIES, self._studies - part * PART_STUDIES):
                raise self._damaged(name)
            last = footer.row_group(footer.num_row_groups - 1)
            chunks = [last.column(i) for i in range(footer.num_columns)]
            end = max(first_byte(c) + c.total_compressed_size for c in chunks) + length
            first = min(first_byte(c) for c in chunks if c.path_in_schema in columns)
            if footer.num_row_groups > 1:
                first = 0
            if end - first > len(tail):
                tail = self._read(name, slice(first, None))
            groups, kept = range(footer.num_row_groups), [name for name in columns if name == "split"]
            return parquet.read_groups(tail, end - len(tail), footer, groups, INDEX_SCHEMA, columns, keep=kept)
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise self._damaged(name) from error

    def _footer(self, part: int) -> pq.FileMetaData:
        return self._footers.made(part, lambda: self._read_footer(part))

    def _read_footer(self, part: int) -> pq.FileMetaData:
        name = part_name("studies", part)
        length = int.from_bytes(self._read(name, slice(-8, None))[:4], "little") + 8
        data = self._read(name, slice(-length, None))
        try:
            return pq.read_metadata(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(name) from error

    def read_group(self, part: int, group: int) -> pa.RecordBatch:
        """Every column of one row group, not kept."""
        name = part_name("studies", part)
        footer = self._footer(part)
        rows = min(GROUP_STUDIES, self._studies - part * PART_STUDIES - group * GROUP_STUDIES)
        if group >= footer.num_row_groups or footer.row_group(group).num_rows != rows:
            raise self._damaged(name)
        chunks = [footer.row_group(group).column(i) for i in range(footer.num_columns)]
        starts = [first_byte(c) for c in chunks]
        start, end = min(starts), max(s + c.total_compressed_size for s, c in zip(starts, chunks))
        try:
            data = self._read(name, slice(start, end))
            table = parquet.read_groups(data, start, footer, [group], self._schema)
            return table.combine_chunks().to_batches()[0]
        except ValueError as error:
            raise self._damaged(name) from error

    def _read(self, name: str, byte_range: slice) -> bytes:
        if self._folder is not None and not (self._folder / name).is_file():
            raise self._missing(name)
        try:
            found = self._kvstore.read(name, byte_range=byte_range).result()
        except ValueError as error:
            raise self._damaged(name) from error
        if found.state == "missing":
            raise self._missing(name)
        return found.value

    def _missing(self, name: str) -> UserError:
        return UserError(f"{self._url}/{name}: is missing from the store; copy the store again or build it again")

    def _damaged(self, name: str) -> UserError:
        return UserError(
            f"{self._url}/{name}: is damaged, cut short or not what store.json says; copy the store again or build it "
            "again"
        )
