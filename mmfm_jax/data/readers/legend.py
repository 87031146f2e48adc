"""What the names and numbers of a segmentation mean: the classes of a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmfm_jax.data.refuse import Refused

_MOST_VALUES = 2**24


@dataclass(frozen=True)
class Legend:
    """What the names and numbers of a source mean."""

    classes: tuple[str, ...]
    values: Mapping[str, str]
    """Class by the name or number of a segment; a class's own name needs no entry, nor do 1, 2, ... without any number
    here."""
    others: bool
    """Whether segments of no class are background; else they are refused."""

    def of_names(self, names: Sequence[str]) -> list[int]:
        """The number of each segment's class, 1 + index, or 0 for background. Raises Refused."""
        meant = [self.values.get(name, name) for name in names]
        return self._known([self.classes.index(name) + 1 if name in self.classes else 0 for name in meant], "segments")

    def of_voxels(self, voxels: np.ndarray) -> np.ndarray:
        """Class numbers, uint8, of whole numbers [k, j, i], of which 0 is background. Raises Refused."""
        low, high = float(voxels.min()), float(voxels.max())
        if not high - low < _MOST_VALUES:
            raise Refused("not_a_mask", "its numbers are not finite, or too far apart to stand for classes")
        first = round(low)
        seen = np.zeros(round(high) - first + 1, bool)
        for plane in voxels:
            whole = np.rint(plane)
            if np.abs(plane - whole).max() > 1e-3:
                raise Refused("not_a_mask", "it holds numbers that are not whole")
            seen[whole.astype(np.int64) - first] = True
        values = [value for value in (np.flatnonzero(seen) + first).tolist() if value]
        table = np.zeros(len(seen), np.uint8)
        table[np.array(values, int) - first] = self._known([self._of_value(value) for value in values], "values")
        return np.stack([table[np.rint(plane).astype(np.int64) - first] for plane in voxels])

    def _of_value(self, value: int) -> int:
        if any(spelling.isdigit() for spelling in self.values):
            name = self.values.get(str(value))
            return self.classes.index(name) + 1 if name else 0
        return value if 0 < value <= len(self.classes) else 0

    def _known(self, numbers: list[int], what: str) -> list[int]:
        if not self.others and (unknown := numbers.count(0)):
            raise Refused("unknown_class", f"{unknown} of its {len(numbers)} {what} are of no declared class")
        return numbers
