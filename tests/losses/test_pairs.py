"""Contrast in blocks against the dense losses in float64, on one device and on meshes, and what it holds and sends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from mmfm_jax.losses import pairs
from mmfm_jax.losses.pairs import contrast
from mmfm_jax.parallel.mesh import AXES

KINDS = ("sigmoid", "softmax")
STUDIES, WIDTH = 24, 3
MESHES = [
    None,
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "sequence": 2},
    {"fsdp": 5},  # does not divide the batch, which then stays whole
]


def draw(seed, n=STUDIES):
    """Unit vectors of both sides, who has both, scale, bias, and texts of which several are equal."""
    rng = np.random.default_rng(seed)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, n, WIDTH)))
    text = np.stack([rng.integers(0, 2**32, (n, 2), np.uint32)[rng.integers(0, n, n)] for _ in range(2)], axis=1)
    numbers = (np.float32(x) for x in (a, b, rng.uniform(1, 100), rng.uniform(-9, 3)))
    return *numbers, rng.random(n) < 0.8, text


def dense(kind, a, b, scale, bias, paired, text) -> list[float]:
    """The loss and the accuracy with every pair in one matrix."""
    logits = scale * a @ b.T + bias
    n = len(a)
    alike = (text[:, None] == text[None]).all(-1).any(-1)
    compared = paired[:, None] & paired[None] & (~alike | np.eye(n, dtype=bool))
    if kind == "sigmoid":
        sign = 2 * np.eye(n) - 1
        loss = np.logaddexp(0, -sign * logits)[compared].sum() / max(paired.sum(), 1)
    else:

        def one_way(logits, compared):
            rows = [np.logaddexp.reduce(logits[i, compared[i]]) - logits[i, i] for i in np.flatnonzero(paired)]
            return np.mean(rows) if rows else 0.0

        loss = (one_way(logits, compared) + one_way(logits.T, compared.T)) / 2
    hits = [np.where(compared[i], logits[i], -np.inf).argmax() == i for i in np.flatnonzero(paired)]
    return [float(loss), float(np.mean(hits)) if hits else 0.0]


def differences(function, arguments, step=1e-5):
    """The gradient by central differences, element by element."""
    gradients = [np.zeros(np.shape(x)) for x in arguments]
    for k, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            ends = []
            for side in (step, -step):
                moved = [np.array(x) for x in arguments]
                moved[k][index] += side
                ends.append(function(*moved))
            gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradients


def context(sizes):
    """The mesh of these sizes, and the split of a batch over it."""
    shape = [(sizes or {}).get(axis, 1) for axis in AXES]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)
    return mesh, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def gradient_of(kind):
    def loss(a, b, scale, bias, paired, text):
        found, accuracy = contrast(kind, a, b, paired, scale, bias, text)
        return found.value, accuracy.value

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_gradient_and_accuracy_in_blocks_are_those_of_the_dense_loss(sizes, kind, monkeypatch):
    monkeypatch.setattr(pairs, "LARGEST_BLOCK", 6)  # columns in parts, the last of them padded
    gradient = gradient_of(kind)

    @settings(max_examples=4)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed):
        arguments = draw(seed)
        if sizes is None:
            (loss, accuracy), slopes = gradient(*arguments)
        else:
            with jax.set_mesh(context(sizes)[0]):
                (loss, accuracy), slopes = gradient(*arguments)
        wide = [np.asarray(x, np.float64) for x in arguments[:4]]
        expected = dense(kind, *wide, *arguments[4:])
        np.testing.assert_allclose([loss, accuracy], expected, rtol=2e-5, atol=2e-5)
        numeric = differences(lambda *moved: dense(kind, *moved, *arguments[4:])[0], wide)
        for name, got, slope in zip(("a", "b", "scale", "bias"), slopes, numeric):
            np.testing.assert_allclose(got, slope, rtol=2e-4, atol=2e-5, err_msg=name)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_pair_has_no_loss_and_no_gradient_even_if_nan(kind):
    a, b, scale, bias, _, text = draw(0)
    none = np.zeros(STUDIES, bool)
    (loss, accuracy), slopes = gradient_of(kind)(a * np.nan, b, scale, bias, none, text)
    assert loss == 0 and accuracy == 0 and not any(np.asarray(slope).any() for slope in slopes)


def shapes_in(jaxpr):
    """Of every array that a program makes, those of the programs in it included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, core.Jaxpr):
                    yield from shapes_in(inner)


def large_case(kind, studies, width):
    mesh, split = context({"data": 2, "fsdp": 4})
    side = jax.ShapeDtypeStruct((studies, width), jnp.float32, sharding=split)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    paired = jax.ShapeDtypeStruct((studies,), jnp.bool_, sharding=split)
    text = jax.ShapeDtypeStruct((studies, 2, 2), jnp.uint32, sharding=split)
    with jax.set_mesh(mesh):
        return gradient_of(kind).trace(side, side, number, number, paired, text)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_larger_than_the_embeddings_or_a_block_is_made_at_32768_studies(kind):
    studies, width, devices = 32768, 64, 8
    traced = large_case(kind, studies, width)
    largest = max(np.prod(shape, dtype=int) for shape in shapes_in(traced.jaxpr.jaxpr))
    assert largest == pairs.LARGEST_BLOCK < studies * (studies // devices)


@pytest.mark.parametrize("kind, passes", [("sigmoid", 1), ("softmax", 2)])
def test_embeddings_go_round_the_ring_and_are_never_gathered(kind, passes):
    studies, width = 512, 48
    hlo = large_case(kind, studies, width).lower().compile().as_text() or ""
    sent = re.findall(r"= (\w+\[[\d,]+\])\S* collective-permute\(", hlo)
    own, stops = studies // 8, 8
    # Forward: columns and tags at each stop. Backward: those and the gradient, and the gradient home. What backward
    # sends once more the compiler may keep, what no stop needs it leaves out, and on a CPU there is no loop.
    columns, tags = sent.count(f"f32[{own},{width}]"), sent.count(f"u32[{own},5]")
    assert columns + tags == len(sent)
    assert passes * (2 * stops - 1) <= columns <= passes * (3 * stops + 1) and stops - 1 <= tags <= passes * 2 * stops
    assert "all-gather" not in hlo and "all-to-all" not in hlo
