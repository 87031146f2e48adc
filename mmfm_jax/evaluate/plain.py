"""What baselines are given: tables, bags of texts and simple numbers of images, read from the store without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, vstack

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.store.studies import Extent, Studies
from mmfm_jax.data.store.study_store import DamagedImage
from mmfm_jax.metrics.bags import Bag, Piece, Readings
from mmfm_jax.metrics.baselines import Plain, make_table
from mmfm_jax.metrics.held_out import Split
from mmfm_jax.metrics.image_numbers import INTENSITY, SHAPE, intensity_numbers, outline_scale, shape_numbers

LARGEST = 1 << 21  # voxels of an image that are looked at, about its centre
LOOKED_AT = 32  # training images by which it is decided whether a role shows outlines
CHUNK = 1_000  # test studies whose texts are held at once
THREADS = 8


def drawn_rows(store: Studies, split: str, limit: int) -> Int[np.ndarray, "study"]:
    """At most `limit` rows of a split, in store order: those of the patients of the lowest keyed hash.

    They do not depend on the order of the store, and are among those of any larger limit. Raises UserError when the
    split has no patients.
    """
    rows = store.rows(split)
    if len(rows) <= limit:
        return rows
    return rows[np.sort(np.argsort(store.shares(rows), kind="stable")[:limit])]


def read_plain(samples: Samples, columns: Sequence[str], train: Split, test: Split) -> tuple[Plain, Plain]:
    """Of the training and the test studies; vocabularies, and what an image role shows, are of the training studies.

    Of an image of more than LARGEST voxels the middle is read.
    """
    store = samples.store
    tables = [
        make_table([store.table(int(row))[1] for row in of.rows], tuple(columns), store.schema) for of in (train, test)
    ]
    of_train, of_test = _bags(samples, train.rows, test.rows)
    outlines = {role: _outline_scale(samples, role, train.rows) for role in samples.spec.images}
    images = [_numbers(samples, outlines, of.rows) if outlines else None for of in (train, test)]
    return (
        Plain(train.patients, tables[0], of_train, images[0]),
        Plain(test.patients, tables[1], of_test, images[1]),
    )


# ---------------------------------------------------------------- texts


def _bags(samples: Samples, train: np.ndarray, test: np.ndarray) -> tuple[dict[str, csr_matrix], dict[str, csr_matrix]]:
    """Of all readings of a study, and of the first alone where some study has more."""
    if not samples.spec.texts:
        return {}, {}
    readings: list[Readings] = [samples.readings(int(row)) for row in train]
    several = max(map(len, readings), default=0) > 1
    bags: dict[str, Bag] = {}
    pieces: tuple[Piece, ...] = ("sentences", "words")
    for of, first in itertools.product(pieces, (False, True) if several else (False,)):
        try:
            bags[f"first_{of}" if first else of] = Bag(of, readings, first)
        except ValueError:  # no training study says anything
            continue
    del readings
    parts: dict[str, list[csr_matrix]] = {name: [] for name in bags}
    for start in range(0, len(test), CHUNK):
        chunk: list[Readings] = [samples.readings(int(row)) for row in test[start : start + CHUNK]]
        for name, bag in bags.items():
            parts[name].append(bag(chunk))
    return {name: bag.train for name, bag in bags.items()}, {k: csr_matrix(vstack(of)) for k, of in parts.items()}


# ---------------------------------------------------------------- images


def _outline_scale(samples: Samples, role: str, rows: np.ndarray) -> float | None:
    def images() -> Iterator[np.ndarray]:
        for row in rows:
            if (held := _middle(samples, role, int(row))) is not None:
                yield held[0]

    return outline_scale(itertools.islice(images(), LOOKED_AT))


def _numbers(
    samples: Samples, outlines: dict[str, float | None], rows: np.ndarray
) -> Float[np.ndarray, "study number"]:
    """Of every role and channel: numbers of its intensities, and of its shape where it shows outlines."""

    def of_study(row: int) -> np.ndarray:
        found = []
        for role, full in outlines.items():
            held = _middle(samples, role, row)
            for channel in range(samples.store.schema.images[role].channels):
                if held is None:
                    found.append(np.full(len(INTENSITY) + (len(SHAPE) if full else 0), np.nan))
                    continue
                voxels, spacing_mm = held[0][..., channel], held[1]
                found.append(intensity_numbers(voxels, spacing_mm))
                if full:
                    found.append(shape_numbers(voxels / np.float32(full), spacing_mm))
        return np.concatenate(found)

    with ThreadPoolExecutor(THREADS) as threads:
        return np.stack(list(threads.map(of_study, map(int, rows))))


def _middle(samples: Samples, role: str, row: int) -> tuple[np.ndarray, tuple[float, float, float]] | None:
    """Voxels [z, y, x, channel] of at most LARGEST about the centre of an image, and their spacing; of none that is
    absent or damaged (`Damage`)."""
    store = samples.store
    info = store.volume_info(role, row)
    if info is None:
        return None
    shape, spacing_mm = info
    size = middle_size(shape)
    z, y, x = ((whole - part) // 2 for whole, part in zip(shape, size))
    try:
        return store.crop(role, row, (z, y, x), size), spacing_mm
    except DamagedImage as error:
        samples.damage.leave_out(role, row, error)
        return None


def middle_size(shape: Extent) -> Extent:
    """The shape, its longest axis halved until it has at most LARGEST voxels."""
    size = list(shape)
    while np.prod(size) > LARGEST:
        longest = int(np.argmax(size))
        size[longest] //= 2
    z, y, x = size
    return z, y, x
