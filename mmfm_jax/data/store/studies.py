"""What training and evaluation read: one store, or several as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import tensorstore as ts

from mmfm_jax.config.inputs import ImageInput, Window
from mmfm_jax.data.store.stats import Stats
from mmfm_jax.data.study import Schema

if TYPE_CHECKING:
    from mmfm_jax.data.store.study_store import StudyStore

Extent = tuple[int, int, int]
TableRow = tuple[dict[str, tuple[str, ...]], dict[str, float | str], dict[str, int]]


@dataclass(frozen=True)
class Wanted:
    """Names of the texts, columns and labels that are decoded of each study."""

    texts: frozenset[str] = frozenset()
    columns: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()


class Studies(Protocol):
    """Studies by row number. What is read of one study is read of the store that `locate` finds.

    `StudyStore` reads it, and says how; a collection of stores need not say it again.
    """

    mixed: bool
    """Whether a batch says which store each study is of."""
    names: Sequence[str]
    """Of `stores`, as a configuration has them."""
    stores: Sequence[StudyStore]
    """The store itself, or those that are read as one."""

    @property
    def url(self) -> str: ...

    @property
    def schema(self) -> Schema: ...

    @property
    def stats(self) -> Stats: ...

    def __len__(self) -> int: ...

    def rows(self, split: str) -> np.ndarray:
        """Rows of a split, int64 [studies]. Raises UserError when it has no patients."""
        ...

    def sources(self, split: str) -> list[tuple[float, np.ndarray]]:
        """Weight and rows of the split of each store that training draws from."""
        ...

    def patients(self, rows: np.ndarray) -> np.ndarray:
        """Keyed patient hash of each row, str [rows]."""
        ...

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """Place of each row's patient among all, by hash (`share_of`), uint32 [rows]."""
        ...

    def source(self, row: int) -> int:
        """Which store, in the order of names, a study is of."""
        ...

    def locate(self, row: int) -> tuple[Studies, int]:
        """The store that holds a study, and its row there."""
        ...

    # ------------------------------------------------------------ what a study holds: see StudyStore

    def table(self, row: int, wanted: Wanted | None = None) -> TableRow:
        store, own = self.locate(row)
        return store.table(own, wanted)

    def texts(self, rows: Iterable[int]) -> Iterator[str]:
        for row in rows:
            store, own = self.locate(row)
            yield from store.texts([own])

    def volume_info(self, role: str, row: int) -> tuple[Extent, tuple[float, float, float]] | None:
        store, own = self.locate(row)
        return store.volume_info(role, own) if role in store.schema.images else None

    def crop(self, role: str, row: int, start: Extent, size: Extent, fill: float = 0) -> np.ndarray:
        store, own = self.locate(row)
        return store.crop(role, own, start, size, fill)

    def begin_crop(self, out: np.ndarray, role: str, row: int, start: Extent, fill: float = 0) -> Callable[[], None]:
        store, own = self.locate(row)
        return store.begin_crop(out, role, own, start, fill)

    def begin_crops(
        self, out: np.ndarray, places: Sequence[int], role: str, rows: Sequence[int], start: Extent
    ) -> Callable[[], None] | None:
        """The studies are of one store."""
        store, own = self.locate(rows[0])
        return store.begin_crops(out, places, role, [row - rows[0] + own for row in rows], start)

    def inside(self, role: str, row: int, start: Extent, size: Extent) -> ts.TensorStore:
        store, own = self.locate(row)
        return store.inside(role, own, start, size)

    def foreground(self, role: str, row: int, above: float | None = None) -> np.ndarray:
        store, own = self.locate(row)
        return store.foreground(role, own, above)

    def intensities(self, role: str, row: int) -> np.ndarray:
        store, own = self.locate(row)
        return store.intensities(role, own)

    def mask_voxels(self, name: str, row: int) -> np.ndarray | None:
        store, own = self.locate(row)
        return store.mask_voxels(name, own) if name in store.schema.masks else None

    def mask_positions(self, name: str, row: int, index: int) -> np.ndarray:
        store, own = self.locate(row)
        return store.mask_positions(name, own, index) if name in store.schema.masks else np.zeros((0, 3), np.int32)

    def mask_crop(self, name: str, row: int, start: Extent, size: Extent) -> np.ndarray:
        store, own = self.locate(row)
        return store.mask_crop(name, own, start, size)

    # ------------------------------------------------------------ how images enter

    def without_intensities(self, role: str) -> str | None:
        """The URL of a store that was written without samples of the role's intensities."""
        ...

    def image_input(self, role: str, image: ImageInput, row: int) -> ImageInput:
        """How an image of the study's store enters the model."""
        ...

    def image_inputs(self, role: str, image: ImageInput) -> list[ImageInput]:
        """Likewise, of every store that has the role."""
        ...

    def windows(self, images: Mapping[str, ImageInput]) -> dict[str, tuple[Window | tuple[Window, ...], ...]]:
        """By role, the window of each store, of roles where they differ."""
        ...
