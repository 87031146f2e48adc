"""What MEDS and FHIR have in common: events of patients, with codes, a time and a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from mmfm_jax.data.moment import Moment


class Event(NamedTuple):
    """One coded record of a patient; the identifier is in it, so never to be printed or stored."""

    patient: str
    codes: tuple[str, ...]
    """Spellings of its code."""
    time: Moment | None
    value: float | None
    text: str
    """A value in words; empty when there is none."""
    unit: str
    """As stated; empty when it is not."""


@dataclass
class EventFile:
    """What a file, or a part of it, holds of wanted codes."""

    events: list[Event] = field(default_factory=list)
    patients: set[str] = field(default_factory=set)
    """Everyone of whom it holds anything."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records that were left out, by reason."""


def matches(code: str, wanted: Iterable[str]) -> bool:
    """Whether a code is one of the declared, of which a * at the end stands for any rest."""
    return any(code.startswith(one[:-1]) if one.endswith("*") else code == one for one in wanted)
