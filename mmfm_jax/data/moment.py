"""Points in time as clinical records state them: a date, a clock of one place, or a clock with its zone."""

from __future__ import annotations

import re
from datetime import date, datetime, timedelta

Moment = date | datetime
"""A date when no time of day is known; a datetime without or with a zone."""
_COMPACT = re.compile(r"(\d{8})(?:(\d{2})(\d{2})(\d{2})?(?:\.\d+)?)?([+-]\d{4})?")


def moment(text: str, date_format: str = "") -> Moment | None:
    """A moment in ISO 8601, FHIR or DICOM spelling, or in a strptime format; None when it is none.

    A year or a month alone, which FHIR allows, is no moment: it cannot be placed to the day.
    """
    try:
        if date_format:
            read = datetime.strptime(text, date_format)
            return read if re.search("%[HIcXf]", date_format) else read.date()
        if found := _COMPACT.fullmatch(text):
            day, hour, minute, second, zone = found.groups()
            if hour is None:
                return datetime.strptime(day, "%Y%m%d").date()
            clock = f"{day}{hour}{minute}{second or '00'}"
            return datetime.strptime(clock + (zone or ""), "%Y%m%d%H%M%S" + ("%z" if zone else ""))
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return date.fromisoformat(text)
        return datetime.fromisoformat(text) if re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", text) else None
    except (ValueError, OverflowError):
        return None


def days_between(start: Moment, end: Moment) -> float:
    """Days from `start` to `end`.

    Where one has no time of day, whole calendar days, each as its own clock shows it. Where both have a zone, real
    time; where one has none, as its clock shows it, as if both were of one place.
    """
    if not (isinstance(start, datetime) and isinstance(end, datetime)):
        return float((_day(end) - _day(start)).days)
    if start.tzinfo is None or end.tzinfo is None:
        start, end = start.replace(tzinfo=None), end.replace(tzinfo=None)
    return (end - start) / timedelta(days=1)


def _day(one: Moment) -> date:
    return one.date() if isinstance(one, datetime) else one
