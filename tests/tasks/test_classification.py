"""What a classification head says of held-out patients."""

import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import roc_auc_score

from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.held_out import HeldOut, Split
from mmfm_jax.metrics.statistics import fitted_temperature
from mmfm_jax.tasks.classification import Classification, ClassificationConfig

STUDIES = 80


def claims(seed):
    """Log-probabilities and labels of which they know something, too sure by half."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, STUDIES)
    odds = 3 * (2 * label - 1 + rng.normal(0, 2, STUDIES))
    return -np.logaddexp(0, np.stack([odds, -odds], axis=1)), label


def split(label, predicted, all_texts):
    of = {"diagnosis": {"fused": predicted}}
    everything = {"diagnosis": {"fused": all_texts}} if all_texts is not None else {}
    return Split(np.arange(STUDIES), np.arange(STUDIES), {"disease": label}, {}, of, {}, all_texts=everything)


@pytest.fixture(scope="module")
def task(material):
    config = ClassificationConfig(label="disease")
    return Classification("diagnosis", config, material.experiment.model, material.spec, nnx.Rngs(0))


def measured(task, test, validation):
    def nothing(*_):
        raise AssertionError("not to be asked")

    of = test.all_texts.get("diagnosis", {})
    seen = HeldOut(
        test, test.predicted["diagnosis"], of, lambda: validation, "diagnosis", {"disease": ("no", "yes")},
        Bootstrap(20, 0), 0, "test", (1,), 2, lambda *_: {}, nothing, nothing, "", nothing, nothing, nothing,
    )  # fmt: skip
    return {name: m.value for name, m in task.measure(seen).measures.items()}


def auroc(claimed, label):
    return pytest.approx(roc_auc_score(label, claimed[:, 1] - claimed[:, 0]))


def test_all_texts_come_first_and_the_temperature_is_that_of_validation_patients(task):
    first, label = claims(0)
    every, _ = claims(1)
    of_validation, validation_label = claims(2)
    validation_label[:9] = -1  # carry no label
    found = measured(task, split(label, first, every), split(validation_label, claims(3)[0], of_validation))
    assert found["disease/fused/auroc"] == auroc(every, label)
    assert found["disease/fused_first_text/auroc"] == auroc(first, label)
    assert found["disease/fused/temperature"] == fitted_temperature(of_validation[9:], validation_label[9:]) > 1.2
    assert found["disease/fused/tempered_calibration_error"] != found["disease/fused/calibration_error"]


def test_studies_of_one_text_have_one_view_and_without_validation_patients_there_is_no_temperature(task):
    first, label = claims(0)
    unlabelled = split(np.full(STUDIES, -1), first, None)
    for validation in (None, unlabelled):
        found = measured(task, split(label, first, None), validation)
        assert found["disease/fused/auroc"] == auroc(first, label)
        assert not any("first_text" in name or "temper" in name for name in found)
