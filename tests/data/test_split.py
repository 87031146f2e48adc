"""Splits are stable, in proportion, and give nothing away."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.data.split import FRACTIONS, fingerprint, pseudonym, share_of, split_of
from mmfm_jax.errors import UserError


def test_shares_of_many_patients_are_the_fractions():
    n = 20_000
    counts = Counter(split_of(f"patient-{i}", "key") for i in range(n))
    for name, share in FRACTIONS.items():
        assert abs(counts[name] / n - share) < 4 * (share * (1 - share) / n) ** 0.5


@given(st.text(), st.text(min_size=1))
def test_a_split_depends_on_the_patient_and_the_key_alone(patient, key):
    assert split_of(patient, key) == split_of(patient, key)
    assert pseudonym(patient, key) == pseudonym(patient, key)
    assert len(pseudonym(patient, key)) == 32


def test_growing_the_last_share_moves_patients_only_out_of_the_one_before():
    patients = [f"patient-{i}" for i in range(2000)]
    before = {p: split_of(p, "key", {"train": 0.8, "test": 0.2}) for p in patients}
    after = {p: split_of(p, "key", {"train": 0.7, "test": 0.3}) for p in patients}
    assert all(after[p] == "test" for p in patients if before[p] == "test")


def test_shares_of_patients_are_nested_in_proportion_and_say_nothing_of_the_split():
    n = 8000
    patients = [pseudonym(f"p{i}", "key") for i in range(n)]
    of = {share: {p for p in patients if share_of(p) < share * 2**32} for share in (0, 0.25, 0.5, 1)}
    assert not of[0] and of[0.25] < of[0.5] < of[1] == set(patients)
    for share, chosen in of.items():
        assert abs(len(chosen) / n - share) <= 4 * (share * (1 - share) / n) ** 0.5
    test = {pseudonym(f"p{i}", "key") for i in range(n) if split_of(f"p{i}", "key") == "test"}
    assert abs(len(of[0.25] & test) / len(test) - 0.25) < 4 * (0.25 * 0.75 / len(test)) ** 0.5


def test_another_key_gives_other_splits_and_pseudonyms():
    patients = [f"patient-{i}" for i in range(500)]
    assert [split_of(p, "a") for p in patients] != [split_of(p, "b") for p in patients]
    assert not {pseudonym(p, "a") for p in patients} & {pseudonym(p, "b") for p in patients}
    assert fingerprint("a") != fingerprint("b")


def test_a_pseudonym_says_nothing_of_the_split():
    """Both are hashes of the patient in contexts of their own: half of all leading digits fall in each half."""
    test = [pseudonym(f"p{i}", "key") for i in range(8000) if split_of(f"p{i}", "key") == "test"]
    low = sum(int(p[0], 16) < 8 for p in test) / len(test)
    assert abs(low - 0.5) < 4 * 0.5 / len(test) ** 0.5


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.5, "test": -0.5}])
def test_fractions_that_are_not_shares_are_refused(fractions):
    with pytest.raises(UserError, match="sum to 1"):
        split_of("patient", "key", fractions)


def test_an_empty_key_is_refused():
    with pytest.raises(UserError, match="key is empty"):
        pseudonym("patient", "")
