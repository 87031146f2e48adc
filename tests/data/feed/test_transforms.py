"""What the device does to a batch, against plain numpy, and what absent parts cannot do."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.config.data import Augment
from mmfm_jax.data.batch import Batch, ImagePart, ImageShape, InputSpec, LabelPart, NumberStats, TablePart, TextPart
from mmfm_jax.data.feed.transforms import prepare

SPEC = InputSpec(
    images={
        "ct": ImageShape(size=(6, 8, 10), patch=(2, 2, 2), channels=1, window=(-1000, 400)),
        "photo": ImageShape(size=(1, 8, 6), patch=(1, 2, 2), channels=3, window=(0, 255)),
    },
    texts={"report": 5},
    vocabulary_size=300,
    mask_token=1,
    numbers={"age": NumberStats(mean=60, sd=12), "dose": NumberStats(mean=1e-3, sd=1e-4)},
    categories={"sex": ("female", "male")},
    labels={"malignancy": ("benign", "malignant")},
)
EVERYTHING = Augment(flip=0.5, shift_mm=3, rotate_degrees=20, intensity=0.3)
STUDIES = 8  # of nearly every batch here, so that each function is compiled once


def make_batch(rng: np.random.Generator, n: int = STUDIES, dtype=np.float32) -> Batch:
    """Random studies, any part of which may be absent."""

    def present(*shape):
        return rng.random((n, *shape)) < 0.6

    images = {
        role: ImagePart(
            rng.uniform(-1200, 600, (n, *image.size, image.channels)).astype(dtype),
            rng.uniform(0.5, 3, (n, 3)).astype(np.float32),
            present(),
        )
        for role, image in SPEC.images.items()
    }
    table = TablePart(
        rng.normal([60, 1e-3], [12, 1e-4], (n, 2)).astype(np.float32), present(2),
        rng.integers(0, 2, (n, 1)).astype(np.int32), present(1),
    )  # fmt: skip
    texts = {
        "report": TextPart(
            rng.integers(0, 300, (n, 5)).astype(np.int32), present(), rng.integers(0, 9, (n, 2), np.uint32)
        )
    }
    labels = {"malignancy": LabelPart(rng.integers(0, 2, n).astype(np.int32), present())}
    return Batch(np.arange(n, dtype=np.int32), images, texts, table, labels)


def spoil_absent(batch: Batch, number: float, index: int) -> Batch:
    """The batch with `number` and `index` wherever something is absent."""

    def spoil(values, present):
        present = np.reshape(present, present.shape + (1,) * (values.ndim - present.ndim))
        wrong = number if values.dtype.kind == "f" else index
        return np.where(present, values, np.asarray(wrong).astype(values.dtype))

    table = batch.table
    return replace(
        batch,
        images={
            role: ImagePart(spoil(p.voxels, p.present), spoil(p.spacing_mm, p.present), p.present)
            for role, p in batch.images.items()
        },
        texts={
            name: TextPart(spoil(p.tokens, p.present), p.present, spoil(p.digest, p.present))
            for name, p in batch.texts.items()
        },
        table=TablePart(
            spoil(table.numbers, table.number_present), table.number_present,
            spoil(table.categories, table.category_present), table.category_present,
        ),
        labels={name: LabelPart(spoil(p.value, p.present), p.present) for name, p in batch.labels.items()},
    )  # fmt: skip


def assert_same(a: Batch, b: Batch, **tolerance) -> None:
    for (path, x), (_, y) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **{"rtol": 0, "atol": 0, **tolerance})


def loss(scale: jax.Array, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Depends on every prepared value, and on a parameter."""
    leaves = jax.tree.leaves(prepare(batch, SPEC, EVERYTHING, rng))
    return jnp.stack([jnp.sin(scale * leaf.astype(jnp.float32)).sum() for leaf in leaves]).sum()


def loss_of_inputs(voxels: dict, numbers: jax.Array, batch: Batch, rng: jax.Array | None) -> jax.Array:
    images = {role: replace(part, voxels=voxels[role]) for role, part in batch.images.items()}
    return loss(jnp.asarray(1.5), replace(batch, images=images, table=replace(batch.table, numbers=numbers)), rng)


plain = jax.jit(lambda batch: prepare(batch, SPEC, None, None))
augmented = jax.jit(lambda batch, rng: prepare(batch, SPEC, EVERYTHING, rng))
gradient = jax.jit(jax.grad(loss))
gradient_of_inputs = jax.jit(jax.grad(loss_of_inputs, argnums=(0, 1)))


# ---------------------------------------------------------------- presence and normalisation


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    number=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
    index=st.sampled_from([-7, 1, 250]),
    key=st.integers(0, 9) | st.none(),
)
def test_what_stands_in_absent_parts_reaches_neither_values_nor_gradients(seed, number, index, key):
    batch = make_batch(np.random.default_rng(seed))
    rng = None if key is None else jax.random.key(key)
    zeroed, spoiled = spoil_absent(batch, 0, 0), spoil_absent(batch, number, index)
    if rng is None:
        assert_same(plain(zeroed), plain(spoiled))
    else:
        assert_same(augmented(zeroed, rng), augmented(spoiled, rng))
    found = gradient(1.5, spoiled, rng)
    assert np.isfinite(found) and found == gradient(1.5, zeroed, rng)


@pytest.mark.parametrize("rng", [None, jax.random.key(0)])
def test_absent_inputs_have_zero_gradient_even_when_nan(rng):
    batch = spoil_absent(make_batch(np.random.default_rng(2)), np.nan, 0)
    voxels = {role: part.voxels for role, part in batch.images.items()}
    by_voxels, by_numbers = gradient_of_inputs(voxels, batch.table.numbers, batch, rng)
    for role, part in batch.images.items():
        assert np.isfinite(by_voxels[role]).all() and not np.asarray(by_voxels[role])[~part.present].any()
        assert np.asarray(by_voxels[role])[part.present].any()
    assert np.isfinite(by_numbers).all() and not np.asarray(by_numbers)[~batch.table.number_present].any()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from([np.int16, np.float32]))
def test_normalisation_is_that_of_numpy(seed, dtype):
    batch = make_batch(np.random.default_rng(seed), dtype=dtype)
    out = plain(batch)
    for role in SPEC.images:
        part, (low, high) = batch.images[role], {"ct": (-1000, 400), "photo": (0, 255)}[role]
        expected = np.clip((part.voxels.astype(np.float64) - low) / (high - low), 0, 1)
        expected[~part.present] = 0
        assert out.images[role].voxels.dtype == np.float32
        np.testing.assert_allclose(out.images[role].voxels, expected, atol=1e-6)
        np.testing.assert_array_equal(out.images[role].spacing_mm[part.present], part.spacing_mm[part.present])
    numbers = np.stack([(batch.table.numbers[:, 0] - 60.0) / 12, (batch.table.numbers[:, 1] - 1e-3) / 1e-4], 1)
    present = batch.table.number_present
    np.testing.assert_allclose(out.table.numbers, np.where(present, numbers, 0), atol=1e-4)
    report = batch.texts["report"]
    np.testing.assert_array_equal(out.texts["report"].tokens, np.where(report.present[:, None], report.tokens, 0))
    np.testing.assert_array_equal(out.study, batch.study)


def test_categories_are_clipped_to_their_vocabulary():
    batch = make_batch(np.random.default_rng(0))
    table = replace(
        batch.table, categories=np.full((STUDIES, 1), 9, np.int32), category_present=np.ones((STUDIES, 1), bool)
    )
    assert plain(replace(batch, table=table)).table.categories.tolist() == [[1]] * STUDIES


# ---------------------------------------------------------------- augmentation as a whole


def dense_batch(n: int, seed: int = 0) -> Batch:
    """Everything present."""
    return jax.tree.map(lambda a: np.ones_like(a) if a.dtype == bool else a, make_batch(np.random.default_rng(seed), n))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_augmented_images_stay_in_the_window_and_the_rest_is_untouched(seed):
    batch = make_batch(np.random.default_rng(seed))
    out, unchanged = augmented(batch, jax.random.key(seed)), plain(batch)
    for role, part in out.images.items():
        assert part.voxels.dtype == jnp.float32
        assert float(part.voxels.min()) >= 0 and float(part.voxels.max()) <= 1
        assert not np.asarray(part.voxels)[~batch.images[role].present].any()
    assert_same(replace(out, images={}), replace(unchanged, images={}))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_moved_images_stay_in_the_window(seed):
    """Interpolation weights may round to a sum above one."""
    batch = dense_batch(STUDIES, seed)
    white = {role: replace(part, voxels=np.full_like(part.voxels, 1000)) for role, part in batch.images.items()}
    out = moved_only(replace(batch, images=white), jax.random.key(seed))
    assert max(float(part.voxels.max()) for part in out.images.values()) <= 1


moved_only = jax.jit(lambda batch, rng: prepare(batch, SPEC, Augment(flip=0.5, shift_mm=4, rotate_degrees=90), rng))


def test_augmentation_is_a_function_of_the_key_and_differs_between_studies():
    batch = jax.tree.map(lambda a: np.repeat(a[:1], STUDIES, axis=0), dense_batch(1))
    a, b, c = (augmented(batch, jax.random.key(k)) for k in (0, 0, 1))
    assert_same(a, b)
    for role in SPEC.images:
        assert not np.array_equal(a.images[role].voxels, c.images[role].voxels)
        assert len({np.asarray(v).tobytes() for v in a.images[role].voxels}) == STUDIES


def test_nothing_is_augmented_without_options_or_without_a_key():
    batch = make_batch(np.random.default_rng(0))
    expected = plain(batch)
    assert_same(jax.jit(lambda b: prepare(b, SPEC, EVERYTHING, None))(batch), expected)
    assert_same(jax.jit(lambda b: prepare(b, SPEC, None, jax.random.key(0)))(batch), expected)
    nothing = Augment(flip=0, shift_mm=0, rotate_degrees=0, intensity=0)
    assert_same(jax.jit(lambda b: prepare(b, SPEC, nothing, jax.random.key(0)))(batch), expected)


SHARDED = """
import jax, numpy as np, re, sys
sys.path.insert(0, {folder!r})
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import test_transforms as t
batch, key = t.make_batch(np.random.default_rng(0), 16), jax.random.key(5)
f = jax.jit(lambda b, k: t.prepare(b, t.SPEC, t.EVERYTHING, k))
alone = jax.device_get(f(jax.device_put(batch, jax.devices()[0]), key))
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
put = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
t.assert_same(alone, jax.device_get(f(put, key)), atol=1e-5)
program = f.lower(put, key).compile().as_text()
used = set(re.findall(r"(all-gather|all-to-all|collective-permute|reduce-scatter)", program))
assert not used, used
sharding = f(put, key).images["ct"].voxels.sharding
assert sharding.is_equivalent_to(put.images["ct"].voxels.sharding, 5), sharding
"""


def test_sharding_the_batch_changes_nothing_and_moves_no_study():
    env = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(sys.path),
    }
    script = SHARDED.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
