"""Texts as bags of sentences and words."""

import numpy as np
import pytest

from mmfm_jax.metrics.bags import Bag

TRAIN = [
    [{"report": "A 3.5 mm nodule. No effusion!", "note": "seen"}, {"report": "a 3.5 mm nodule."}],
    [{"report": "No effusion."}],
    [],
]


def test_an_entry_is_the_share_of_a_studys_texts_of_a_field_that_hold_the_piece():
    bag = Bag("sentences", TRAIN)
    # in the order of the pieces: note: seen; report: a 3.5 mm nodule; report: no effusion
    np.testing.assert_allclose(bag.train.toarray(), [[1, 1, 0.5], [0, 0, 1], [0, 0, 0]])
    first = Bag("sentences", TRAIN, first=True)
    np.testing.assert_allclose(first.train.toarray(), [[1, 1, 1], [0, 0, 1], [0, 0, 0]])
    asked = [[{"report": "Unknown. NO EFFUSION? no effusion."}], [{"other": "seen"}]]
    np.testing.assert_allclose(bag(asked).toarray(), [[0, 0, 1], [0, 0, 0]])


def test_only_the_commonest_words_of_training_are_told_apart():
    texts = [[{"report": f"common word{i} frequent"}] for i in range(9)] + [[{"report": "common"}]]
    bag = Bag("words", texts, limit=2)
    np.testing.assert_array_equal(bag.train.toarray(), [[1, 1]] * 9 + [[1, 0]])


@pytest.mark.parametrize("studies", [[], [[{"report": "..."}], []]])
def test_no_bag_of_texts_that_say_nothing(studies):
    with pytest.raises(ValueError):
        Bag("words", studies)
