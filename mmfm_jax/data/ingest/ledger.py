"""The account of a run: every input is counted once, as taken or as refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mmfm_jax.data.deid.identifiers import Hider
from mmfm_jax.data.refuse import Refused, Reject


@dataclass(frozen=True)
class Counts:
    """Of one source: inputs = taken + refused."""

    inputs: int
    taken: int
    refused: int


class Ledger:
    """Inputs by source, and what was refused of them. A file counts as one input, and so does a row of a table."""

    def __init__(self, hider: Hider):
        self._hider = hider
        self._inputs: dict[str, set[tuple[str, int]]] = {}
        self._refused: dict[tuple[str, str, int], Reject] = {}
        self._values: set[Reject] = set()
        self._parts: dict[tuple[str, str], dict[str, Refused | None]] = {}

    def count(self, source: str, path: str, row: int = 0) -> None:
        """Says that an input of `source` (images, texts, tables.NAME) is there; `row` is 0 for a file."""
        self._inputs.setdefault(source, set()).add((path, row))

    def refuse(self, source: str, path: str, why: Refused, row: int = 0) -> None:
        """The whole input is left out; the first reason stands."""
        self.count(source, path, row)
        reject = Reject(source, self._hider.file(path), row, "", why.reason, why.detail)
        self._refused.setdefault((source, path, row), reject)

    def leave_out(self, source: str, path: str, part: str, why: Refused, row: int = 0) -> None:
        """One value of an input that is otherwise taken is left out."""
        self._values.add(Reject(source, self._hider.file(path), row, part, why.reason, why.detail))

    def expect(self, source: str, path: str, part: str) -> None:
        """Says that a file may be taken for a part, such as a mask; refused for all its parts, it is refused whole."""
        self._parts.setdefault((source, path), {}).setdefault(part, None)

    def refuse_part(self, source: str, path: str, part: str, why: Refused) -> None:
        """The file is not taken for that part; the first reason stands."""
        parts = self._parts[source, path]
        parts[part] = parts[part] or why
        if all(parts.values()):
            self.refuse(source, path, why)

    def is_refused(self, source: str, path: str, row: int = 0) -> bool:
        return (source, path, row) in self._refused

    @property
    def rejects(self) -> list[Reject]:
        """Inputs and values that are not in the store, sorted."""
        parts = {
            Reject(source, self._hider.file(path), 0, part, why.reason, why.detail)
            for (source, path), held in self._parts.items()
            if (source, path, 0) not in self._refused
            for part, why in held.items()
            if why
        }
        return sorted([*self._refused.values(), *self._values, *parts])

    def counts(self) -> dict[str, Counts]:
        """By source."""
        refused = Counter(source for source, _, _ in self._refused)
        return {
            source: Counts(len(held), len(held) - refused[source], refused[source])
            for source, held in sorted(self._inputs.items())
        }


def by_reason(rejects: Iterable[Reject]) -> list[tuple[Reject, int]]:
    """One reject of each source, part and reason with how many there are, most first."""
    counted: dict[tuple[str, str, str], list[Reject]] = {}
    for reject in rejects:
        counted.setdefault((reject.source, reject.part, reject.reason), []).append(reject)
    return sorted(((held[0], len(held)) for held in counted.values()), key=lambda one: (-one[1], one[0]))
