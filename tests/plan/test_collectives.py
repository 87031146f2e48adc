"""What a step of training sends over the links of a pod: each parameter twice, each gradient once, and little else."""

import jax
import pytest

from mmfm_jax.experiment import validate
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import hlo, lower
from mmfm_jax.plan.estimate import estimate
from mmfm_jax.plan.links import Network
from mmfm_jax.plan.plan import gradient_bytes

DATA, FSDP, STUDIES, WIDTH = 2, 8, 64, 512
EXPERIMENT = {
    "name": "pair",
    "inputs": {
        "images": {"ct": {"size": [8, 32, 32], "patch": [2, 8, 8], "window": [-1000, 1000]}},
        "texts": {"report": {"length": 16}},
    },
    "data": {"store": "nowhere", "vocabulary_size": 1024},
    "model": {
        "vision": {"width": WIDTH, "depth": 3, "heads": 4, "registers": 0, "remat": "hidden"},
        "text": {"width": WIDTH, "depth": 2, "heads": 4, "remat": "hidden"},
        "table": {"width": 16, "depth": 1, "heads": 1},
        "fusion": {"width": 16, "depth": 1, "heads": 1, "latents": 1},
    },
    "tasks": {"image_text": {"kind": "contrastive", "between": ["image", "text"], "width": WIDTH}},
    "mesh": {"data": DATA, "fsdp": FSDP},
    "train": {"steps": 1000, "batch_size": STUDIES},
}


def test_a_step_gathers_each_shard_twice_scatters_each_gradient_once_and_sends_no_more_than_the_ring(make_pod):
    of = make_pod("v5e:4x4")
    experiment = validate(EXPERIMENT, "the test")
    mesh = make_mesh(experiment.mesh, of.devices)
    program = lower.make_program(experiment, lower.assumed_spec(experiment), mesh)
    text = lower.compile_step(program).as_text() or ""
    sent = {
        kind: sum(by_link.values())
        for kind, by_link in estimate(
            hlo.parse(text), of.chip, Network(mesh.devices.flat, of.chip)
        ).collective_bytes.items()
    }

    leaves = jax.tree.leaves(program.state.params)
    split = sum(2 * leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)  # bytes in bfloat16
    gradients = 2 * split  # in float32
    whole = sum(4 * leaf.size for leaf in leaves if leaf.sharding.is_fully_replicated)
    others = (FSDP - 1) / FSDP
    assert sent.pop("all-gather") == pytest.approx(2 * split * others, rel=0.04)
    assert 0.9 * gradients * others < (scattered := sent.pop("reduce-scatter")) <= 1.02 * gradients * others
    # The shards' gradients once over `data`, in float32; those of norms over all, and scalars.
    assert gradients / FSDP < (reduced := sent.pop("all-reduce")) < 1.1 * gradients / FSDP + 2 * whole
    assert gradient_bytes(program) == pytest.approx(scattered + reduced, rel=0.1)
    # The texts' vectors pass every other chip, forward and backward, and in backward bring their gradients home.
    ring = (DATA * FSDP) * STUDIES // (DATA * FSDP) * WIDTH * 4
    assert sent.pop("collective-permute") <= 3.5 * ring
    # Words are looked up in the width that a chip holds, then sent to where their study is.
    assert sent.pop("all-to-all", 0) <= 2 * 2 * STUDIES // DATA * 16 * WIDTH / FSDP
    assert not sent
