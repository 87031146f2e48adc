"""`dataset.yaml`, the part of events: records with a code and a time, which become columns by a window of time."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from mmfm_jax.config.base import Config
from mmfm_jax.data.deid.identifiers import per_year
from mmfm_jax.data.ingest.table_fields import Patterns

VALUES = ("last", "first", "mean", "min", "max")
"""Of `take`: what looks at values, not only at whether and when there were events."""


class StudyTime(Config):
    """When a study took place: what windows are measured from."""

    table: str = ""
    """Table with a column of times; none is needed where there is one table."""
    column: str = ""
    """Column of a date, with or without a time of day."""
    date_format: str = ""
    """strptime format; ISO 8601 and DICOM's YYYYMMDD and YYYYMMDDHHMMSS are read without."""
    image: str = ""
    """Or an image role: the StudyDate and StudyTime of its DICOM series."""

    @model_validator(mode="after")
    def _one(self):
        if bool(self.column) == bool(self.image) or (self.image and (self.table or self.date_format)):
            raise ValueError("needs either a table's column or an image role")
        return self


class EventSource(Config):
    """Events in time: MEDS shards, or Observation and Condition resources of FHIR."""

    format: Literal["meds", "fhir"]
    """MEDS (Parquet shards) or FHIR (.ndjson, .json)."""
    files: Annotated[Patterns, Field(min_length=1)]
    """Patterns below the root: the .parquet shards of MEDS, or the .json and .ndjson files of FHIR."""
    study_time: StudyTime | None = None
    """When a study took place, to measure windows from."""
    patient_system: str = ""
    """System of the patient's FHIR identifier that other sources use; without it, the id of the Patient resource."""
    unit_column: str = ""
    """Column of MEDS that states the unit of a value."""
    unit_from_code: bool = False
    """The unit of a MEDS value is what follows the last // of its code, as in LAB//creatinine//mg/dL."""

    @model_validator(mode="after")
    def _fits_format(self):
        if self.format == "fhir" and (self.unit_column or self.unit_from_code):
            raise ValueError("unit_column and unit_from_code are of MEDS; FHIR states units")
        if self.format == "meds" and self.patient_system:
            raise ValueError("patient_system is of FHIR")
        if self.unit_column and self.unit_from_code:
            raise ValueError("needs one of unit_column and unit_from_code, not both")
        return self


class FromEvents(Config):
    """How a field is made of events."""

    events: str = ""
    """Source of the events; may be left out when there is one."""
    codes: tuple[str, ...] = ()
    """Events that count: a code of MEDS, or of FHIR `system|code` or the code alone; a * at the end stands for any
    rest."""
    take: Literal["last", "first", "mean", "min", "max", "count", "any", "since"] = "last"
    """Which value of the events in the window: the last or first (of time), the mean, least or greatest; how many there
    are; for a category of two words whether there is any (the second word) or none (the first); or the time from the
    last event to the study, in the column's unit. `count` and `any` are known of patients of whom the source holds
    anything."""
    window_days: tuple[float, float] | None = None
    """Days from the study, both ends included: [-30, 0] is the month before it. Where event or study has no time of
    day, calendar days are compared, and then 0 holds what came later on the day of the study."""
    static: bool = False
    """Takes events without a time, such as the sex, instead of those in a window."""
    units: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Other units of values, and what to multiply them by to get the column's; "" is for events that state none."""

    def check_events(self, kind: str, unit: str, words: tuple[str, ...]) -> None:
        """Raises ValueError for what does not go together; `words` are those of a category or the classes."""
        if not self.codes:
            if self.events or self.window_days or self.static or self.units or self.take != "last":
                raise ValueError("events, take, window_days, static and units go with codes")
            return
        if any(not code.strip("*") or "*" in code[:-1] for code in self.codes):
            raise ValueError("a code needs a beginning, and * may stand at its end only")
        if bool(self.window_days) == self.static:
            raise ValueError("needs window_days, such as [-30, 0], or static: true")
        if self.window_days and not (
            all(map(isfinite, self.window_days)) and self.window_days[0] <= self.window_days[1]
        ):
            raise ValueError("window_days needs two numbers of days, the earlier first")
        takes = {"number": {*VALUES, "count", "since"}, "category": {"last", "first", "any"}}.get(kind, set())
        if self.take not in takes:
            raise ValueError(
                f"a {kind} of events cannot take {self.take}; it takes {', '.join(sorted(takes)) or 'none'}"
            )
        if self.take == "any" and len(words) != 2:
            raise ValueError("any needs two words, that for none and that for some")
        if self.static and self.take not in ("last", "any"):
            raise ValueError("static events have no time; take last (the only value) or any")
        if self.take == "since" and per_year(unit) is None:
            raise ValueError("since needs a unit of time: days, weeks, months or years")
        if self.take == "count" and unit:
            raise ValueError("a count has no unit")
        if self.units and (kind != "number" or self.take not in VALUES):
            raise ValueError("units are of numbers that take a value")
