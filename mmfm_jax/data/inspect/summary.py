"""What a store holds, as text: behind `mmfm inspect STORE`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.screen import plain, printable


def summary(store: StudyStore) -> RenderableType:
    """Tables of studies, images (z y x), texts, columns and labels; only `store.json` and `stats.json` are read.

    Ranges, means and percentiles are those of the train split, as models are given them.
    """
    file = store.file
    head = plain(f"{store.url}\n", "bold")
    head.append(f"{len(store):,} studies, format version {file.format_version}", style="not bold")
    for name, value in file.source.items():
        told = f"{name.replace('_', ' ')}: {value}"
        head.append(f"\n{printable(told)}", style="not bold")
    parts: list[RenderableType] = [head]
    if file.description:
        parts.append(plain(f"\n{file.description}"))
    tables = [_splits(store), _images(store), _texts(store), _numbers(store), _categories(store), _labels(store)]
    tables.append(_masks(store))
    return Group(*parts, *(table for table in tables if table.row_count))


def _table(title: str, *columns: str) -> Table:
    """The first column is text, the others are numbers."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(plain(column), justify="right" if i else "left", no_wrap=not i)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(plain, cells))


def _splits(store: StudyStore) -> Table:
    parts = [
        f"{kind} {name}"
        for kind, held in (
            ("image", store.schema.images),
            ("text", store.schema.texts),
            ("mask", store.schema.masks),
        )
        for name in held
    ]
    table = _table("Splits", "split", "patients", "studies", *parts)
    for split, counts in store.counts.items():
        held = [
            *(counts.images.get(r, 0) for r in store.schema.images),
            *(counts.texts.get(t, 0) for t in store.schema.texts),
            *(counts.masks.get(m, 0) for m in store.schema.masks),
        ]
        _add(table, split, *(f"{n:,}" for n in (counts.patients, counts.studies, *held)))
    return table


def _images(store: StudyStore) -> Table:
    table = _table("Images", "role", "type", "channels", "voxels", "spacing mm", "1%", "99%", "highest")
    for role, spec in store.schema.images.items():
        stats = store.stats.images[role]
        shape = _extent(spec.shape) if spec.shape else f"{_extent(stats.shape_median)} (median)"
        percentiles = [f"{stats.percentiles[p]:g}" if stats.percentiles else "" for p in ("1", "99", "100")]
        spacing = _extent(stats.spacing_mm_median) if stats.volumes else ""
        _add(table, role, spec.dtype, str(spec.channels), shape, spacing, *percentiles)
    return table


def _texts(store: StudyStore) -> Table:
    table = _table("Texts", "field", "studies", "texts", "words, mean", "words, most")
    for name in store.schema.texts:
        stats = store.stats.texts[name]
        _add(table, name, f"{stats.studies:,}", f"{stats.texts:,}", f"{stats.words_mean:.1f}", str(stats.words_max))
    return table


def _numbers(store: StudyStore) -> Table:
    table = _table("Numbers", "column", "unit", "mean", "sd", "lowest", "highest", "missing")
    for name, stats in store.stats.numbers.items():
        values = (f"{value:.4g}" for value in (stats.mean, stats.sd, stats.low, stats.high))
        _add(table, name, store.schema.columns[name].unit, *values, f"{stats.missing:,}")
    return table


def _categories(store: StudyStore) -> Table:
    table = _table("Categories", "column", "value", "studies")
    for name, stats in store.stats.categories.items():
        for value, count in [*stats.counts.items(), ("missing", stats.missing)]:
            _add(table, name, value, f"{count:,}")
    return table


def _labels(store: StudyStore) -> Table:
    table = _table("Labels", "label", "class", *store.counts)
    for name, label in store.schema.labels.items():
        for value in label.classes:
            held = [counts.labels.get(name, {}).get(value, 0) for counts in store.counts.values()]
            _add(table, name, value, *(f"{n:,}" for n in held))
        left = [c.studies - sum(c.labels.get(name, {}).values()) for c in store.counts.values()]
        _add(table, "", "unlabelled", *(f"{n:,}" for n in left))
    return table


def _masks(store: StudyStore) -> Table:
    table = _table("Masks", "mask", "image", "class", "volumes with it", "voxels, mean of those")
    for name, spec in store.schema.masks.items():
        stats = store.stats.masks[name]
        for value in spec.classes:
            mean = stats.voxels[value] / max(1, stats.volumes[value])
            _add(table, name, spec.image, value, f"{stats.volumes[value]:,} of {stats.masks:,}", f"{mean:,.0f}")
    return table


def _extent(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)
