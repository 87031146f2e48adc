"""The experiments that come with the project are ones that it takes, and fill the pods that they are for."""

import math
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from mmfm_jax.experiment import load_experiment
from mmfm_jax.parallel.mesh import AXES
from mmfm_jax.train.fit import check_fit

CONFIGS = Path(__file__).parents[1] / "configs"
PODS = {"pod": 256, "siglip_vit_l": 256, "vit_g_3d": 512, "multimodal_7b": 512, "long_volume": 256}
OTHERS = {"demo", "packed"}
FILES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("pod/*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_divides_over_its_mesh(path):
    experiment = load_experiment(path, [])
    sizes = [getattr(experiment.mesh, axis) for axis in AXES]
    if path.stem not in OTHERS:
        assert math.prod(sizes) == PODS[path.stem]
        check_fit(experiment, AbstractMesh(tuple(sizes), AXES))
