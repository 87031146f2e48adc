"""What a run tells of how it learns, from losses made up for it."""

import pytest

from mmfm_jax.config.training import CheckpointConfig, TrainConfig
from mmfm_jax.train.health import STILL, Health
from mmfm_jax.train.patience import Patience


@pytest.fixture
def heard():
    return []


@pytest.fixture
def health(heard):
    return Health(["pairs/loss", "masked/image/ct", "masked/text/report"], heard.append)


def step(pairs: float = 1.0, image: float = 1.0, text: float = 1.0) -> dict[str, float]:
    masked = {"masked/image/ct": image, "masked/text/report": text, "masked/loss": image + text}
    return {"loss": 1.0, "pairs/loss": pairs, "pairs/accuracy": 0.0, **masked}


def test_a_part_that_had_nothing_to_learn_from_for_long_is_named_once(health, heard):
    for number in range(2 * STILL):
        health.trained(step(image=0.0, pairs=float(number % STILL == 3)))
        assert bool(heard) == (number >= STILL - 1)
    (told,) = heard
    assert told.startswith("tasks.masked: its loss of image/ct was 0 in each of 100 steps, so that nothing is learnt")


def test_one_that_lost_what_it_learns_from_later_is_named_too(health, heard):
    for number in range(3 * STILL):
        health.trained(step(pairs=float(number < STILL)))
    assert [told.partition(":")[0] for told in heard] == ["tasks.pairs"]


def test_of_a_short_run_it_is_said_at_its_end(health, heard):
    for _ in range(5):
        health.trained(step(pairs=0.0))
    health.trained(step(pairs=0.0, text=0.0))
    assert not heard
    health.finish()
    health.finish()
    (told,) = heard
    assert told.startswith("tasks.pairs: its loss was 0 in each of 6 steps")


def test_a_run_of_no_step_says_nothing(health, heard):
    health.finish()
    assert not heard


def goes(health, training: list[float], validation: list[float]) -> None:
    for number, (loss, held_out) in enumerate(zip(training, validation), 1):
        for _ in range(3):
            health.trained(step(pairs=loss))
        health.validated(10 * number, {"validation/pairs/loss": held_out, "validation/masked/loss": 1.0})


def test_validation_that_rises_three_times_while_training_falls_is_told_once_with_numbers(health, heard):
    goes(health, [5, 4, 3.9, 3.8, 3.7, 3.6], [5, 4, 6, 9, 14.3, 15])
    (told,) = heard
    assert told.startswith(
        "tasks.pairs: its validation loss, 14.300 at step 50, was above the 4.000 of step 20 3 times in a row while "
        "that of training fell from 4.000 to 3.700: "
    )


@pytest.mark.parametrize(
    "training, validation",
    [
        ([5, 4, 3, 2, 1, 1], [5, 4, 6, 6, 3.9, 6]),  # better in between
        ([5, 4, 3, 2, 1, 1], [5, 4, 4.1, 4.15, 4.19, 4.1]),  # by chance
        ([5, 4, 5, 6, 7, 8], [5, 4, 6, 9, 14, 15]),  # training rises too
        ([5, 4, 3, 2], [5, 4, 6, 6]),  # not for long
    ],
)
def test_what_may_be_chance_or_is_no_learning_by_heart_is_not_told(health, heard, training, validation):
    goes(health, training, validation)
    assert not heard


def patience(measured=None, first=0, mode="auto", best="validation/loss", **train) -> Patience:
    config = {"steps": 1000, "batch_size": 4, "validate_every": 10, "patience": 2, **train}
    return Patience(
        TrainConfig.model_validate(config), CheckpointConfig.model_validate({"best": best, "best_mode": mode}),
        measured or {}, first,
    )  # fmt: skip


@pytest.mark.parametrize(
    "best, values, over_after",
    [
        ("validation/loss", [3, 2, 2.5, 1, 1.5, 1.0, 9], 6),
        ("validation/a/auroc", [0.5, 0.6, 0.55, 0.7, 0.65, 0.7, 0.1], 6),
        ("validation/loss", [float("nan"), 3, float("nan"), 2, 1, 1, 1], 7),
    ],
)
def test_patience_counts_validations_that_are_no_better(best, values, over_after):
    waits, over = patience(best=best), []
    for number, value in enumerate(values, 1):
        waits.validated({best: value})
        over += [number] if waits.is_over else []
    assert over[:1] == [over_after]


def test_patience_goes_on_over_restarts():
    """Step 20 was the best, 30 no better, and 40 is still to come."""
    waits = patience({20: {"validation/loss": 2.0}, 35: {}}, first=35)
    assert not waits.is_over
    waits.validated({"validation/loss": 2.0})
    assert waits.is_over and waits.told() == "2 validations in a row gave no better validation/loss (train.patience 2)"
    assert patience({20: {"validation/loss": 2.0}}, first=40).is_over


def test_without_patience_a_run_goes_to_its_end():
    waits = patience(patience=None)
    for _ in range(100):
        waits.validated({"validation/loss": 1.0})
    assert not waits.is_over
