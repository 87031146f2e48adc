"""De-identification: what stands in the store for identifiers, dates and ages.

All of it is a function of the key and the input alone, so a second run gives the same store, and without the key
nothing is turned back. `docs/privacy.md` maps it to DICOM PS3.15 Annex E and to the identifiers of 45 CFR
164.514(b)(2).
"""

from __future__ import annotations

import re
from datetime import date, timedelta

from mmfm_jax.data.split import digest, pseudonym

OLDEST_YEARS = 90
"""Ages from here on are one class: 45 CFR 164.514(b)(2)(i)(C) aggregates ages over 89."""
SHIFT_DAYS = 3652
_EPOCH = date(1970, 1, 1)
_YEARS_IN = {
    "year": 1.0, "years": 1.0, "y": 1.0, "yr": 1.0, "yrs": 1.0, "a": 1.0,
    "month": 12.0, "months": 12.0, "mo": 12.0,
    "week": 52.1775, "weeks": 52.1775, "wk": 52.1775,
    "day": 365.2425, "days": 365.2425, "d": 365.2425,
}  # fmt: skip
_AGE_STRING = re.compile(r"^(\d{1,3})([DWMY])$")


class Hider:
    """Keyed stand-ins for identifiers."""

    def __init__(self, key: str):
        self._key = key

    def patient(self, identifier: str) -> str:
        """32 hex digits."""
        return pseudonym(identifier, self._key)

    def file(self, path: str) -> str:
        """16 hex digits that stand for a path below the root, whose names may identify."""
        plain = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # names need not be UTF-8
        return digest(plain, self._key, "file").hex()[:16]

    def state(self, text: str) -> str:
        """32 hex digits that stand for the state of inputs: names, sizes, times."""
        plain = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return digest(plain, self._key, "state").hex()[:32]

    def shift_days(self, patient: str) -> int:
        """Days by which all dates of a patient move back: 1 to 3,652, the same for all of them."""
        return 1 + int.from_bytes(digest(patient, self._key, "dates")[:8], "big") % SHIFT_DAYS

    def shifted(self, patient: str, day: date) -> float:
        """Days from 1970-01-01 to a date, after the patient's shift."""
        return float((day - timedelta(days=self.shift_days(patient)) - _EPOCH).days)


def per_year(unit: str) -> float | None:
    """How many of a unit of time a year has; None for other units."""
    return _YEARS_IN.get(unit.strip().lower())


def capped_age(value: float, unit: str) -> float:
    """A number of years, months, weeks or days, at most that of 90 years; a number of another unit as it is."""
    of_year = per_year(unit)
    if of_year is None:
        return value
    limit = OLDEST_YEARS * of_year
    return limit if value >= limit else value


def age_in(text: str, unit: str) -> float | None:
    """A DICOM age string (`045Y`, `018M`) in a unit of time; None when it is none or the unit is not of time."""
    found, of_year = _AGE_STRING.match(text.strip().upper()), per_year(unit)
    if found is None or of_year is None:
        return None
    count, letter = int(found.group(1)), found.group(2)
    return count / {"Y": 1.0, "M": 12.0, "W": 52.1775, "D": 365.2425}[letter] * of_year


def reaches_past_89(day: date, newest: date) -> bool:
    """Whether a date beside a newer one would tell an age of 90 years or more."""
    return (newest - day).days >= OLDEST_YEARS * 365.2425 - 1
