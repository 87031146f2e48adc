"""A run on packed images tells how much of its rows is padding, and is told from bad configurations."""

import copy
import json

import numpy as np
import pytest

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError
from mmfm_jax.evaluate.pictures import middle_slice
from mmfm_jax.train import folder
from mmfm_jax.train.loop import train

PACKED = {
    "inputs.images.ct": {
        "size": [4, 8, 8], "patch": [2, 4, 4], "window": [0, 255], "pack": {"studies": 2, "tokens": 13, "trim": True}
    },
    "inputs.texts": {},
    "inputs.columns": [],  # arrays of no element are parted too
    "data.augment": {"flip": 0.5, "intensity": 0.1},
    "tasks": {"disease": {"kind": "classification", "label": "disease"}},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "train": {"steps": 2, "batch_size": 16, "accumulate": 2, "log_every": 1, "validate_batches": 1},
}  # fmt: skip


def test_a_run_reports_the_share_of_padding(make_experiment, tmp_path):
    experiment, run = make_experiment(copy.deepcopy(PACKED)), tmp_path / "run"
    assert train(experiment, run).step == 2
    _, spec, tokenizer = folder.read(run)
    samples = Samples(StudyStore.open(experiment.data.store), experiment.inputs, spec, tokenizer)
    order = training_rows(samples, "train", experiment.seed)
    batches = local_batches(order, 16, np.arange(16), 0, 2, 1, samples.packed)
    expected = [float((next(batches).packed["ct"].segment == 0).mean()) for _ in range(2)]
    batches.close()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["padding"] for line in lines if "padding" in line], expected, rtol=1e-6)
    assert min(expected) > 0 and any("validation/loss" in line for line in lines)
    study = next(row for row in samples.store.rows("test") if samples.read(row, None).packed["ct"].present)
    assert middle_slice(samples, int(study)).pixels.shape == (8, 8, 1)  # its voxels reach all borders


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"inputs.images.ct.pack": {"studies": 4, "tokens": 3}}, "inputs.images.ct.pack: 3 tokens leave no patch"),
        ({"data.augment": {"rotate_degrees": 5}}, "which packed images (inputs.images.ct.pack) cannot do; set both"),
        ({"inputs.images.mr": {"size": [1, 8, 8], "patch": [1, 4, 4], "window": [0, 1],
                               "pack": {"studies": 4, "tokens": 30}}}, "inputs: images are packed 2 and 4 studies"),
        ({"train.batch_size": 12}, "make it a multiple of 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused_in_one_sentence(make_experiment, tmp_path, changes, said):
    with pytest.raises(UserError) as error:
        train(make_experiment(copy.deepcopy(PACKED | changes)), tmp_path / "run")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
