"""An experiment is refused where what it encodes, and not only what it reads, does not divide over the mesh."""

import re
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from mmfm_jax.errors import UserError
from mmfm_jax.experiment import load_experiment
from mmfm_jax.parallel.mesh import AXES
from mmfm_jax.train.fit import check_fit

LONG = Path(__file__).parents[2] / "configs/pod/long_volume.yaml"


def test_a_long_volume_divides_over_a_ring_of_eight_with_any_share_hidden():
    experiment = load_experiment(LONG, [])
    masked = experiment.tasks["masked"]
    for share in (0.1, 0.5, 0.6, 0.613, 0.75, 0.9):
        changed = masked.model_copy(update={"image": share})
        tasks = {**experiment.tasks, "masked": changed}
        check_fit(experiment.model_copy(update={"tasks": tasks}), AbstractMesh((1, 32, 8, 1), AXES))
        (shown,) = changed.sequence_lengths(experiment.inputs, 0)["image"]
        assert shown % 8 == 0 and abs(shown / 131_072 - (1 - share)) < 1 / 512


@pytest.mark.parametrize("pack", [None, {"studies": 2, "tokens": 30}])
def test_a_share_of_which_a_mesh_does_not_divide_what_is_shown_is_refused_for_one_that_does(make_experiment, pack):
    changes = {"inputs.images.ct.size": [4, 16, 16], "model.vision.registers": 0, "tasks.masked.image": 0.6}
    changes |= {"data.augment": {}, "inputs.images.ct.pack": pack} if pack else {}
    mesh = AbstractMesh((1, 1, 2, 1), AXES)
    with pytest.raises(UserError, match=r"tasks\.masked\.image: a share of 0\.6 leaves 13 tokens") as refused:
        check_fit(make_experiment(changes), mesh)
    share = float(re.findall(r"make it ([\d.]+)", str(refused.value))[0])
    check_fit(make_experiment(changes | {"tasks.masked.image": share}), mesh)
