"""What no training study holds is refused by name; a batch larger than the split is told."""

import copy
import dataclasses

import numpy as np
import pytest

from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, Study
from mmfm_jax.errors import UserError
from mmfm_jax.train.held import check_held, crowded


@pytest.fixture
def make_store(tmp_path, small_store):
    """`make_store(change)`: a store of whole studies, those for training changed."""

    def study(number: int) -> Study:
        return Study(
            f"patient{number:03d}", "train" if number % 2 else "validation",
            images={"ct": Image(np.zeros((4, 8, 8, 1), np.uint8), (1.0, 1.0, 1.0))}, texts={"report": ("Seen.",)},
            row={"age": 60.0, "size_mm": 5.0, "sex": "male"}, labels={"disease": number // 2 % 2},
        )  # fmt: skip

    def make(change) -> StudyStore:
        studies = [change(one) if one.split == "train" else one for one in map(study, range(24))]
        write_store(str(tmp_path / "store"), StudyStore.open(small_store).schema, studies)
        return StudyStore.open(str(tmp_path / "store"))

    return make


def without(**parts):
    return lambda study: dataclasses.replace(study, **copy.deepcopy(parts))


@pytest.mark.parametrize(
    "change, named",
    [
        (without(images={}), "inputs.images.ct"),
        (without(texts={}), "inputs.texts.report"),
        (without(row={}), "inputs.columns: age, inputs.columns: size_mm, inputs.columns: sex"),
        (without(images={}, texts={}), "inputs.images.ct, inputs.texts.report"),
        (without(row={"size_mm": 1.0, "sex": "male"}), "inputs.columns: age"),
    ],
)
def test_inputs_that_no_training_study_holds_are_named_all_at_once(make_experiment, make_store, change, named):
    with pytest.raises(UserError) as error:
        check_held(make_experiment(), make_store(change))
    assert str(error.value).startswith(f"{named}: none of the 12 training studies of ")


@pytest.mark.parametrize(
    "labels, held", [({}, "none has one"), ({"disease": 1}, "12 are present"), ({"disease": 0}, "12 are absent")]
)
def test_a_label_without_two_classes_is_named_with_what_it_has(make_experiment, make_store, labels, held):
    with pytest.raises(UserError) as error:
        check_held(make_experiment(), make_store(without(labels=labels)))
    assert str(error.value).startswith("tasks.disease.label: the label disease has to tell two classes apart, and of ")
    assert f"{held}; leave the task out" in str(error.value)


def test_what_the_inputs_do_not_ask_for_may_be_missing(make_experiment, make_store):
    tasks = {"masked": {"kind": "masked", "depth": 1}}
    check_held(make_experiment({"tasks": tasks, "inputs.images": {}}), make_store(without(images={}, labels={})))


def test_the_small_store_holds_what_it_should(make_experiment, small_store):
    check_held(make_experiment(), StudyStore.open(small_store))


def test_a_batch_that_holds_a_study_twice_is_told_with_numbers(make_experiment, small_store):
    store = StudyStore.open(small_store)
    (told,) = crowded(make_experiment({"train.batch_size": 96}), store)
    assert told.startswith(
        f"train.batch_size: its 96 studies come out of 60 training studies of {small_store}, so that"
    )
    assert "1.6 times" in told and told.endswith("make it 60 or less")
    assert not list(crowded(make_experiment({"train.batch_size": 60}), store))


def test_of_a_mix_the_store_that_gives_more_than_it_has_is_named(make_experiment, small_store, make_small_store):
    mix = {"few": {"store": make_small_store(20), "weight": 1.0}, "many": {"store": small_store, "weight": 3.0}}
    experiment = make_experiment({"data.store": "", "data.mix": mix, "train.batch_size": 80})
    (told,) = crowded(experiment, open_data(experiment.data))
    assert told.startswith("train.batch_size: 20 of its 80 studies come out of 10 training studies of data.mix.few,")
    assert told.endswith("make it 40 or less")
