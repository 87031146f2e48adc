"""Predictors of a label against each other, and what is left out."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.findings import Forest, Panel
from mmfm_jax.metrics.held_out import HeldOut, Split
from mmfm_jax.metrics.label import Predictions, Temperature, roc_curves, tell

BOOTSTRAP = Bootstrap(resamples=100, seed=0)


def held_out(labels) -> HeldOut:
    """A test split of as many studies as there are labels, one patient each; nothing else may be asked."""

    def nothing(*_):
        raise AssertionError("not to be asked")

    n = len(labels)
    split = Split(np.arange(n), np.array([f"p{i}" for i in range(n)]), {"disease": np.asarray(labels)}, {}, {}, {})
    return HeldOut(
        split,
        {},
        {},
        lambda: None,
        "disease",
        {"disease": ("no", "yes")},
        BOOTSTRAP,
        0,
        "test",
        (1,),
        2,
        nothing,
        nothing,
        nothing,
        "",
        nothing,
        list,
        nothing,
    )


def test_a_label_is_told_of_studies_that_carry_it_and_the_input():
    scores = {"fused": np.stack([np.zeros(5), np.array([0.3, 0.1, 9, -9, 0.2])], 1)}
    measured = np.array([1, 1, 1, 0, 1], bool)
    found = tell("disease", "disease", scores, held_out([0, 1, -1, 1, 0]), "fused", measured)
    auroc = found.measures["disease/fused/auroc"]
    assert (auroc.value, auroc.n) == (0, 3) and found.answered == ("disease",) and not found.notes
    assert [type(exhibit) for exhibit in found.exhibits] == [Forest, Panel, Panel]
    assert all(exhibit.draw().axes for exhibit in found.exhibits if isinstance(exhibit, Panel))
    assert tell("disease", "disease", scores, held_out([0, 1, -1, 1, 0]), measured=~measured).notes
    for labels, given in (([1] * 5, scores), ([0, 1, 1, 0, 1], {})):
        found = tell("odd", "disease", given, held_out(labels))
        assert not found.measures and found.notes[0].startswith("odd is left out: the test studies that carry it")


def test_curves_are_those_of_whole_views_and_of_the_headline():
    scores = np.log(np.random.default_rng(0).dirichlet([1, 1], 20))
    label = np.arange(20) % 2
    names = {"fused_without_text": scores, "fused_without_image": scores, "baseline_size": scores}
    found = Predictions(("no", "yes"), label, np.arange(20), names, headline="fused_without_text")
    assert set(roc_curves(found, "baseline_size")) == {"fused_without_text", "baseline_size"}
    measures = found.measures(BOOTSTRAP)
    assert "fused_without_text_minus_baseline_size/auroc" in measures
    assert "fused_without_text/calibration_error" in measures and "fused/calibration_error" not in measures


def test_calibration_is_measured_raw_and_with_the_temperature_that_was_fitted():
    """Claims of 0.9 and 0.1 that hold in three of four: raw they are 0.15 off, and exact where 0.9 is made 0.75."""
    score = np.log(np.tile([[0.1, 0.9], [0.9, 0.1]], (4, 1)))
    label = np.tile([1, 0], 4)
    label[:2] = [0, 1]
    fitted = Temperature(np.log(9) / np.log(3), 20)
    measures = Predictions(("no", "yes"), label, np.arange(8), {"fused": score}, "fused", temperature=fitted).measures(
        BOOTSTRAP
    )
    assert measures["fused/calibration_error"].value == pytest.approx(0.15)
    assert measures["fused/tempered_calibration_error"].value == pytest.approx(0, abs=1e-9)
    assert (measures["fused/temperature"].value, measures["fused/temperature"].n) == (fitted.value, 20)


def test_gain_over_a_baseline_is_paired():
    """A fused score equal to the baseline gains exactly nothing in every resample, however wide either interval is."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 60)
    score = np.log(rng.dirichlet([1, 1], 60))
    both = Predictions(
        ("no", "yes"),
        label,
        np.arange(60),
        {"fused": score, "baseline_size": score, "baseline_none": 0 * score},
        headline="fused",
    )
    measures = both.measures(BOOTSTRAP)
    gain = measures["fused_minus_baseline_size/auroc"]
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)
    fused, none = measures["fused/auroc"], measures["fused_minus_baseline_none/auroc"]
    assert None not in (fused.low, fused.high)
    np.testing.assert_allclose(np.array([none.low, none.high]), np.array([fused.low, fused.high]) - 0.5)
    assert fused.value == pytest.approx(roc_auc_score(label, score[:, 1]))
    assert measures["fused/calibration_error"].n == 60
