"""A look at a store that costs the same however large it is: some of its studies, spread evenly, and a few pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmfm_jax.data import parquet
from mmfm_jax.data.inspect.slices import Slice
from mmfm_jax.data.refuse import SCHEMA as REJECTS
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError

GROUPS = 256
"""Row groups of 256 studies that are looked at: all of a store of up to 65,536 studies."""
PICTURES = 16
_PICTURE_PIXELS = 192
_MOST_VOXELS = 2**27  # of a slice, with its channels
_THINNEST = 50


@dataclass(frozen=True)
class Survey:
    """Of the studies that were looked at."""

    rows: np.ndarray
    """int64 [studies], ascending."""
    splits: np.ndarray
    """str [studies]."""
    present: dict[tuple[str, str], np.ndarray]
    """By kind (image, text, column, label) and name: bool [studies]."""
    numbers: dict[str, np.ndarray]
    """By column: float64 [studies] in the column's unit, NaN where missing."""
    categories: dict[str, Counter[str]]
    """By column: studies of each word."""
    words: dict[str, np.ndarray]
    """By text field: words of each text, int64 [texts]."""
    spacing_mm: dict[str, np.ndarray]
    """By role: float64 [volumes, z y x]."""
    shape: dict[str, np.ndarray]
    """By role: voxels, int64 [volumes, z y x]."""

    def having(self, role: str) -> np.ndarray:
        """Rows of the studies that have an image."""
        return self.rows[self.present["image", role]]


def survey(store: StudyStore, groups: int = GROUPS) -> Survey:
    """Reads at most `groups` row groups, each by itself; no voxel is read.

    Raises UserError when the store does not hold what it says.
    """
    try:
        return _survey(store, groups)
    except (ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException) as error:
        raise UserError(
            f"{store.url}: its table of studies does not hold what store.json says; copy the store again or build it "
            "again"
        ) from error


def _survey(store: StudyStore, groups: int) -> Survey:
    schema = store.schema
    rows, splits = [], []
    present: dict[tuple[str, str], list[np.ndarray]] = {
        (kind, name): []
        for kind, held in (
            ("image", schema.images),
            ("text", schema.texts),
            ("column", schema.columns),
            ("label", schema.labels),
        )
        for name in held
    }
    numbers = {name: [] for name, column in schema.columns.items() if column.kind == "number"}
    categories = {
        name: Counter(dict.fromkeys(column.vocabulary, 0))
        for name, column in schema.columns.items()
        if column.kind == "category"
    }
    words = {name: [] for name in schema.texts}
    spacings, shapes = {role: [] for role in schema.images}, {role: [] for role in schema.images}
    for first, batch in store.row_groups(groups):
        rows.append(np.arange(first, first + len(batch)))
        splits.append(np.array(batch.column("split").to_pylist(), str))
        for kind, name in present:
            suffix = "/spacing_mm" if kind == "image" else ""
            present[kind, name].append(np.asarray(batch.column(f"{kind}/{name}{suffix}").is_valid()))
        for name, values in numbers.items():
            column = batch.column(f"column/{name}").cast(pa.float64())
            values.append(column.fill_null(np.nan).to_numpy(zero_copy_only=False))
        for name, counts in categories.items():
            counts.update(batch.column(f"column/{name}").drop_null().to_pylist())
        for name, lengths in words.items():
            texts = batch.column(f"text/{name}").flatten().to_pylist()
            lengths.append(np.array([len(text.split()) for text in texts], np.int64))
        for role, spec in schema.images.items():
            held = batch.column(f"image/{role}/spacing_mm").drop_null()
            spacings[role].append(held.flatten().to_numpy().reshape(-1, 3))
            if spec.shape is None:
                own = batch.column(f"image/{role}/shape").drop_null()
                shapes[role].append(own.flatten().to_numpy().astype(np.int64).reshape(-1, 3))
            else:
                shapes[role].append(np.tile(np.array(spec.shape, np.int64), (len(held), 1)))
    return Survey(
        rows=np.concatenate(rows),
        splits=np.concatenate(splits),
        present={key: np.concatenate(parts) for key, parts in present.items()},
        numbers={name: np.concatenate(values) for name, values in numbers.items()},
        categories=categories,
        words={name: np.concatenate(lengths) for name, lengths in words.items()},
        spacing_mm={role: np.concatenate(parts) for role, parts in spacings.items()},
        shape={role: np.concatenate(parts) for role, parts in shapes.items()},
    )


def pictures(store: StudyStore, rows: np.ndarray, role: str, count: int = PICTURES) -> list[Slice]:
    """Middle slices of up to `count` of the studies at `rows`, spread evenly, as one looks at them.

    Only the chunks of that slice are read. Grey values run from the 1st to the 99th percentile of the role. Volumes are
    turned so that the front is up and the patient's right on the left; images of one slice keep rows and columns. A
    slice that is too large or too thin for a picture is left out.
    """
    percentiles = store.stats.images[role].percentiles
    made = []
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))].tolist():
        info = store.volume_info(role, row)
        assert info is not None
        (depth, height, width), (_, y_mm, x_mm) = info
        aspect = height * y_mm / (width * x_mm)
        if height * width * store.schema.images[role].channels > _MOST_VOXELS or not 1 / _THINNEST < aspect < _THINNEST:
            continue
        voxels = store.crop(role, row, (depth // 2, 0, 0), (1, height, width))[0].astype(np.float32)
        if depth > 1:
            voxels = voxels[::-1, ::-1]
        if voxels.shape[-1] != 3:
            voxels = voxels[..., :1]
        by = -(-max(height, width) // _PICTURE_PIXELS)
        y, x = max(1, height // by), max(1, width // by)
        by_y, by_x = height // y, width // x
        voxels = voxels[: y * by_y, : x * by_x].reshape(y, by_y, x, by_x, -1).mean((1, 3))
        low, high = percentiles.get("1", float(voxels.min())), percentiles.get("99", float(voxels.max()))
        pixels = np.clip(np.nan_to_num(voxels - low) / max(high - low, 1e-6), 0, 1)
        made.append(Slice(pixels, (y_mm * by_y, x_mm * by_x)))
    return made


def reject_counts(store: StudyStore) -> list[tuple[str, str, str, str, int]]:
    """(source, part, reason, mend, how many) of what ingest left out, most first; of `rejects.parquet`, if there."""
    data = store.beside("rejects.parquet")
    if data is None:
        return []
    keys = ["source", "part", "reason", "mend"]
    try:
        read = parquet.read(data, REJECTS, keys, keep=keys).unify_dictionaries().combine_chunks()
    except ValueError as error:
        raise UserError(f"{store.url}/rejects.parquet: is damaged; copy the store again or build it again") from error
    counted = read.group_by(keys).aggregate([([], "count_all")])
    held = [(*(row[key] for key in keys), row["count_all"]) for row in counted.to_pylist()]
    return sorted(held, key=lambda one: (-one[-1], *one[:-1]))
