"""Stand-ins are keyed, dates move together and ages are capped."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.data.deid.identifiers import Hider, age_in, capped_age, reaches_past_89
from mmfm_jax.data.ingest.values import day, number, word
from mmfm_jax.data.refuse import Refused

DAYS = st.dates(date(1900, 1, 1), date(2100, 1, 1))


@given(st.text(), st.text(min_size=1), st.text(min_size=1))
def test_stand_ins_depend_on_key_and_kind(text, key, other):
    hidden = [f(text) for f in (Hider(key).patient, Hider(key).file, Hider(key).state)]
    assert hidden == [f(text) for f in (Hider(key).patient, Hider(key).file, Hider(key).state)]
    assert len({h[:16] for h in hidden}) == 3
    assert (key == other) == (Hider(other).patient(text) == hidden[0])


@given(DAYS, DAYS, st.text())
def test_dates_of_a_patient_move_back_by_one_secret_offset(first, second, patient):
    hider = Hider("a key")
    moved = [hider.shifted(patient, d) for d in (first, second)]
    assert moved[1] - moved[0] == (second - first).days
    back = (first - date(1970, 1, 1)).days - moved[0]
    assert 1 <= back <= 3652 and back == hider.shift_days(patient)


def test_offsets_differ_between_patients():
    shifts = {Hider("a key").shift_days(str(i)) for i in range(300)}
    assert len(shifts) > 250


@pytest.mark.parametrize(("unit", "year"), [("years", 1), ("months", 12), ("weeks", 52.1775), ("days", 365.2425)])
def test_ages_over_89_are_one(unit, year):
    assert capped_age(89.9 * year, unit) == 89.9 * year
    assert capped_age(90 * year, unit) == capped_age(107 * year, unit) == 90 * year
    assert number("104Y", unit) == 90 * year
    assert capped_age(104, "mm") == 104


@given(DAYS, st.integers(0, 110))
def test_a_date_beside_a_newer_one_tells_no_age_over_89(birth, years):
    newest = birth + timedelta(days=round(years * 365.2425))
    assert reaches_past_89(birth, newest) == (years >= 90)


def test_dicom_ages():
    assert age_in("045Y", "years") == 45 and age_in("018M", "years") == 1.5 and age_in("006M", "months") == 6
    assert age_in("045Y", "kg") is None and age_in("45", "years") is None


@pytest.mark.parametrize("text", ["1_000", "<5", "1,5", "nan", "inf", "0x1F", "١٢", "1e999", "", "12 mm"])
def test_what_is_no_number(text):
    with pytest.raises(Refused) as raised:
        number(text, "")
    assert raised.value.reason == "not_a_number" and (not text or text not in raised.value.detail)


def test_dates_and_words():
    for text in ("2020-02-29", "20200229", "2020-02-29T10:11:12", "2020.02.29", "20200229101112.123"):
        assert day(text, "") == date(2020, 2, 29)
    assert day("29/02/2020", "%d/%m/%Y") == date(2020, 2, 29)
    for text in ("2021-02-29", "29/02/2020", "soon"):
        with pytest.raises(Refused):
            day(text, "")
    assert word("F", ("female", "male"), {"F": "female"}) == "female"
    with pytest.raises(Refused):
        word("Jane", ("female", "male"), {})
