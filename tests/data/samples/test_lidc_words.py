"""Reports say the ratings and never malignancy; labels are what the readers agree on."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.data.samples.lidc_words import LABELS, MALIGNANCY, SCALES, labels, on_scale, report, sentence

rating = st.fixed_dictionaries(
    {},
    optional={name: st.integers(1, len(words)) for name, (_, words) in SCALES.items()}
    | {MALIGNANCY: st.integers(1, 5)},
)


@given(rating)
def test_a_report_tells_every_rating_but_malignancy(ratings):
    text = report(ratings)
    for name, (_, words) in SCALES.items():
        told = [r for r in range(1, len(words) + 1) if f"{sentence(name, r)} " in f"{text} "]
        assert told == ([ratings[name]] if name in ratings else [])
    assert text == report({name: value for name, value in ratings.items() if name != MALIGNANCY})
    assert not any(word in text.lower() for word in ("malign", "benign", "cancer", "suspicious"))


def test_no_two_sentences_are_alike():
    sentences = [sentence(name, r + 1) for name, (_, words) in SCALES.items() for r in range(len(words))]
    assert len(set(sentences)) == len(sentences) == 4 + 6 + 6 * 5


def test_ratings_off_their_scale_are_known():
    assert [on_scale("internal_structure", r) for r in (None, 0, 1, 4, 5)] == [False, False, True, True, False]
    assert on_scale("calcification", 6) and on_scale(MALIGNANCY, 5) and not on_scale(MALIGNANCY, 6)


@pytest.mark.parametrize(
    ("ratings", "label"),
    [((1,), 0), ((2, 2), 0), ((2, 3), None), ((3,), None), ((1, 5), None), ((3, 4, 4), 1), ((3, 4), None), ((5, 4), 1)],
)
def test_malignancy_is_the_median_with_three_left_out(ratings, label):
    assert labels([{MALIGNANCY: r} for r in ratings]).get(MALIGNANCY) == label


@given(st.lists(rating, min_size=1, max_size=4))
def test_labels_do_not_depend_on_the_order_of_readers_and_are_medians(readers):
    found = labels(readers)
    for order in itertools.permutations(readers):
        assert labels(order) == found
    assert set(found) <= set(LABELS)
    for name, low, high in (("malignancy", 2, 4), ("spiculation", 2, 3), ("lobulation", 2, 3), ("margin", 2, 4)):
        given_ = [r[name] for r in readers if name in r]
        middle = np.median(given_) if given_ else np.nan
        assert found.get(name) == (0 if middle <= low else 1 if middle >= high else None)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_calcification_is_what_more_than_half_saw(ratings):
    share = Fraction(sum(r < 6 for r in ratings), len(ratings))
    expected = None if share == Fraction(1, 2) else int(share > Fraction(1, 2))
    assert labels([{"calcification": r} for r in ratings]).get("calcification") == expected
