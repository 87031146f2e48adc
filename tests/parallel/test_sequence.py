"""Devices that share a sequence share its volume too, from the first arithmetic on, and whatever is joined to it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfm_jax.data.batch import Batch, ImagePart, ImageShape, InputSpec, NumberStats, TablePart, TextPart
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.experiment import validate
from mmfm_jax.model.hiding import hide
from mmfm_jax.model.vision import as_patches
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import AXES
from mmfm_jax.plan import hlo
from mmfm_jax.tasks.base import Views
from mmfm_jax.train.learner import Learner

RING = 4
SIZE, PATCH = (32, 16, 16), (4, 8, 8)
PATCHES, VOXELS = 32, 32 * 16 * 16
STACK = {"width": 8, "depth": 1, "heads": 1}
EXPERIMENT = {
    "name": "long",
    "inputs": {
        "images": {"ct": {"size": SIZE, "patch": PATCH, "window": [-1000, 1000]}},
        "texts": {"report": {"length": 12}},
        "columns": ["age"],
    },
    "data": {"store": "none", "vocabulary_size": 300, "augment": {"flip": 0.5, "flip_with_text": True}},
    "model": {
        "vision": STACK | {"registers": 0}, "text": STACK, "table": STACK, "fusion": STACK | {"latents": 3},
        "dtype": "float32",
    },
    "tasks": {"masked": {"kind": "masked", "image": 0.5, "text": 0.3, "table": 0.5, "depth": 1}},
    "train": {"steps": 1, "batch_size": 1},
}  # fmt: skip
SPEC = InputSpec(
    images={"ct": ImageShape(size=SIZE, patch=PATCH, channels=1, window=(-1000, 1000))},
    texts={"report": 12},
    vocabulary_size=300,
    mask_token=1,
    numbers={"age": NumberStats(mean=50, sd=10)},
    categories={},
    labels={},
)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    one = np.ones(1, bool)
    return Batch(
        study=np.arange(1),
        images={
            "ct": ImagePart(rng.integers(-999, 999, (1, *SIZE, 1)).astype(np.int16), np.ones((1, 3), np.float32), one)
        },
        texts={"report": TextPart(rng.integers(2, 300, (1, 12)).astype(np.int32), one, np.zeros((1, 2), np.uint32))},
        table=TablePart(np.array([[60.0]], np.float32), one[None], np.zeros((1, 0), np.int32), np.zeros((1, 0), bool)),
        labels={},
    )


def on_ring(function, *arguments):
    """What a function gives on one device, what it gives where all hold its arguments whole, and that program."""
    alone = jax.jit(function)(*arguments)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:RING]).reshape(1, 1, RING, 1), AXES)
    with jax.set_mesh(mesh):
        step = jax.jit(function, in_shardings=sharding.replicated(mesh)).lower(*arguments).compile()
        return alone, step(*arguments), step.as_text() or ""


def made(program: str) -> list[hlo.Shape]:
    """Every array that a device makes."""
    of_each = hlo.parse(program).computations.values()
    made = (i for computation in of_each for i in computation.instructions if i.opcode != "parameter")
    return [shape for instruction in made for shape in instruction.shapes]


def test_no_device_of_a_ring_makes_the_whole_volume_in_float32():
    """Windows, mirror images, patches, what is hidden of them and a layer over both; with the layer's gradient."""
    augment = validate(EXPERIMENT, "test").data.augments

    def loss(kernel, raw):
        prepared = prepare(raw, SPEC, augment, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), 1)
        parts = hide(as_patches(prepared.images["ct"], SPEC.images["ct"]), 0.5, PATCHES, keys)
        shown, hidden = (jnp.tanh(part.patches @ kernel) * part.centres_mm.sum(axis=2, keepdims=True) for part in parts)
        return jnp.cos(shown).sum() + jnp.sin(hidden).sum()

    kernel = np.random.default_rng(1).normal(size=(256, 5)).astype(np.float32)
    alone, together, program = on_ring(jax.value_and_grad(loss), kernel, batch())
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    sizes = [shape.size for shape in made(program) if shape.dtype == "f32"]
    assert VOXELS // RING in sizes  # a slab
    assert max(sizes) == VOXELS // 2  # what is shown of it, which is looked for in every slab


def test_tokens_that_are_joined_and_queries_of_hidden_places_are_padded_so_that_a_ring_divides_them():
    """16 patches, 12 tokens and a column are keys of the fusion; 16 patches, 4 tokens and a column are asked for."""
    graph, state = nnx.split(Learner(validate(EXPERIMENT, "test"), SPEC, nnx.Rngs(0)))

    def loss(state, raw):
        learner = nnx.merge(graph, state)
        views = Views(learner.model, prepare(raw, SPEC, None, None))
        return learner.tasks["masked"].loss(views, jax.random.split(jax.random.key(1), 1)).parts

    alone, together, program = on_ring(loss, state, batch())
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    dims = {shape.dims for shape in made(program)}
    assert (1, 24 // RING, 8) in dims and (1, 21, 8) not in dims  # queries
    assert (1, 32 // RING, 8) in dims and (1, 29, 8) not in dims  # keys
