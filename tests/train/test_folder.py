"""Which changes a run may go on with."""

import pytest

from mmfm_jax.errors import UserError
from mmfm_jax.train.folder import check_same


@pytest.mark.parametrize("field, value", [("mesh.tensor", 2), ("train.log_every", 7), ("checkpoint.keep", 5)])
def test_what_leaves_the_mathematics_alone_may_change(make_experiment, tmp_path, field, value):
    check_same(tmp_path, make_experiment(), make_experiment({field: value}))


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", 3),
        ("model.vision.width", 48),
        ("tasks.masked.image", 0.5),
        ("data.augment.flip", 0.1),
        ("optimizer.learning_rate", 1.0),
    ],
)
def test_what_changes_it_is_named(make_experiment, tmp_path, field, value):
    with pytest.raises(UserError) as error:
        check_same(tmp_path, make_experiment(), make_experiment({field: value}))
    assert field in str(error.value) and "--run" in str(error.value)
