"""Cells and tags turned into typed values of the store; what does not fit is refused, never guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import date, datetime

from mmfm_jax.data.deid.identifiers import age_in, capped_age
from mmfm_jax.data.ingest.dataset import Column, Label
from mmfm_jax.data.refuse import Refused

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)


def number(text: str, unit: str) -> float:
    """A finite number, ages capped at 90 years. Raises Refused."""
    value = age_in(text, unit)
    if value is None:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise Refused("not_a_number", "the cell is not a number")
    return capped_age(value, unit)


def word(text: str, words: tuple[str, ...], values: Mapping[str, str]) -> str:
    """The declared word that a cell means. Raises Refused."""
    meant = values.get(text, text)
    if meant not in words:
        raise Refused("not_in_vocabulary", f"the cell is none of the {len(words)} declared words")
    return meant


def day(text: str, date_format: str) -> date:
    """A date; ISO 8601 and DICOM's YYYYMMDD when there is no format. Raises Refused."""
    try:
        if date_format:
            return datetime.strptime(text, date_format).date()
        head = text[:10]
        if re.fullmatch(r"\d{4}\.\d\d\.\d\d", head):  # DICOM before 1993
            head = head.replace(".", "-")
        return date.fromisoformat(head if "-" in head else head[:8])
    except ValueError:
        raise Refused("not_a_date", "the cell is not a date of the declared format") from None


def typed(text: str, field: Column | Label) -> float | str | date | int:
    """A number, a word of a vocabulary, a date, or the index of a label's class. Raises Refused."""
    if isinstance(field, Label):
        return field.classes.index(word(text, field.classes, field.values))
    if field.kind == "number":
        return number(text, field.unit)
    if field.kind == "category":
        return word(text, field.vocabulary, field.values)
    return day(text, field.date_format)
