"""Moments are read in every spelling, and days between them counted as their clocks allow."""

from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.data.moment import days_between, moment

zones = st.integers(-14 * 4, 14 * 4).map(lambda quarters: timezone(timedelta(minutes=15 * quarters)))
clocks = st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)).map(lambda t: t.replace(microsecond=0))
zoned = st.builds(lambda t, zone: t.replace(tzinfo=zone), clocks, zones)


@given(st.one_of(clocks, zoned))
def test_iso_fhir_and_dicom_spellings_are_one_moment(time):
    compact = time.strftime("%Y%m%d%H%M%S%z")
    spellings = {time.isoformat(), str(time), compact}
    if time.tzinfo is not None and time.utcoffset() == timedelta(0):
        spellings.add(time.replace(tzinfo=None).isoformat() + "Z")
    assert {moment(text) for text in spellings} == {time}
    assert moment(time.strftime("%Y%m%d")) == moment(time.date().isoformat()) == time.date()
    assert moment(time.strftime("%d.%m.%Y %H:%M:%S"), "%d.%m.%Y %H:%M:%S") == time.replace(tzinfo=None)
    assert moment(time.strftime("%d/%m/%Y"), "%d/%m/%Y") == time.date()


@pytest.mark.parametrize(
    "text", ["", "2020", "2020-03", "2020-02-30", "20201301", "yesterday", "2020-01-01T25:00", "2020-01-01 x"]
)
def test_what_cannot_be_placed_to_the_day_is_no_moment(text):
    assert moment(text) is None and moment(text, "%Y-%m-%d") is None


@given(zoned, zoned)
def test_zoned_moments_are_real_time_apart(start, end):
    seconds = end.timestamp() - start.timestamp()
    assert days_between(start, end) == pytest.approx(seconds / 86400, abs=1e-9)
    assert days_between(start, end.astimezone(UTC)) == days_between(start, end)


@given(zoned, clocks)
def test_without_a_zone_the_clocks_count_and_without_a_clock_the_calendar(start, end):
    there = start.replace(tzinfo=None)
    assert days_between(start, end) == pytest.approx((end - there).total_seconds() / 86400, abs=1e-9)
    assert days_between(end, start) == pytest.approx(-days_between(start, end), abs=1e-9)
    days = end.toordinal() - date(start.year, start.month, start.day).toordinal()
    assert days_between(start, end.date()) == days_between(start.date(), end) == days
