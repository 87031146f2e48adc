"""Packed equals unpacked, in losses and gradients and on a mesh too, and the studies of a row do not meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.config.hiding import hidden_of
from mmfm_jax.data.batch import PackedPart
from mmfm_jax.data.feed import packing
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.model import ring
from mmfm_jax.model.attention import attention
from mmfm_jax.model.flash import Segments
from mmfm_jax.model.hiding import hide
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import AXES
from mmfm_jax.train.flops import model_flops
from mmfm_jax.train.learner import Learner
from mmfm_jax.train.step import padding, split

STUDIES = 16
TASKS = {
    "image_text": {"kind": "contrastive", "between": ["image", "text"], "width": 16},
    "masked": {"kind": "masked", "depth": 1},
    "disease": {"kind": "classification", "label": "disease"},
}
RTOL, ATOL = 2e-4, 2e-6  # in float32: sums over rows of other lengths are added up in another order


@pytest.fixture(scope="module")
def learner(make_experiment, material):
    noise = {"model.vision.dropout": 0.1, "model.vision.drop_path": 0.3, "model.fusion.dropout": 0.1}
    experiment = make_experiment({"tasks": TASKS, "model.text.depth": 1, **noise})
    return Learner(experiment, material.spec, nnx.Rngs(params=0))


def packed(batch, spec, studies, tokens, seed=0, whole=False):
    """The batch with its images packed; each, if not `whole`, of as many patches as chance gives it."""
    rng, shape, image = np.random.default_rng(seed), spec.images["ct"], batch.images["ct"]
    grids = []
    for voxels, spacing, present in zip(image.voxels, image.spacing_mm, image.present):
        if not present:
            grids.append(packing.nothing(shape, "uint8"))
            continue
        size = [s if whole else p * int(rng.integers(1, s // p + 1)) for s, p in zip(shape.size, shape.patch)]
        grids.append(packing.cut(voxels[tuple(map(slice, size))], list(spacing), shape, trim=False))
    return dataclasses.replace(batch, images={}, packed={"ct": packing.pack(grids, studies, tokens)})


def whole_loss(graph, spec):
    """Loss and its gradient, of raw batches; parts and modalities are hidden by a fixed key."""

    def loss(state, batch):
        return nnx.merge(graph, state).loss(prepare(batch, spec, None, None), jax.random.key(2), train=True)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def gradient(learner, material):
    graph, state = nnx.split(learner)
    function = whole_loss(graph, material.spec)
    return lambda batch: function(state, batch)


def assert_same(got, expected):
    (loss, metrics), gradients = got
    (expected_loss, expected_metrics), expected_gradients = expected
    np.testing.assert_allclose(loss, expected_loss, RTOL)
    for name in expected_metrics:
        tie = 1.5 / STUDIES if name.endswith("accuracy") else ATOL  # of two equal texts, rounding chooses one
        np.testing.assert_allclose(metrics[name], expected_metrics[name], RTOL, tie, err_msg=name)
    size = float(optax.tree.norm(expected_gradients))
    assert np.isfinite(size) and size > 0.1
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected_gradients):
        mine = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(mine, leaf, RTOL, ATOL * size, err_msg=name)


@pytest.fixture(scope="module")
def by_four(material):
    """Four studies a row."""
    batch = packed(material.batch, material.spec, 4, 32)
    held = np.asarray(batch.packed["ct"].segment)
    assert (held > 0).mean() > 0.3 and (held == 0).any() and len(np.unique(held)) == 5
    return batch


@pytest.fixture(scope="module")
def expected(by_four, gradient):
    return gradient(by_four)


def test_packed_loss_and_gradient_are_those_of_a_study_a_row(material, gradient, expected):
    assert_same(expected, gradient(packed(material.batch, material.spec, 1, 8)))


def test_images_of_one_size_are_what_they_are_unpacked(material, gradient):
    """No padding, no segments: the encoder's other path."""
    whole = packed(material.batch, material.spec, 4, 32, whole=True)
    assert_same(gradient(whole), gradient(material.batch))


def test_a_mesh_changes_nothing_of_a_packed_batch(learner, material, by_four, expected, monkeypatch):
    """fsdp 2 x sequence 2 x tensor 2. A row has 32 tokens and 4 x 2 registers; two devices hold half of it each, and
    keys and their segments go round the ring."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 2, 2), AXES)
    graph, state = nnx.split(learner)
    rings, forward = [], ring._ring_forward
    monkeypatch.setattr(ring, "_ring_forward", lambda *args: rings.append(np.shape(args[-1])) or forward(*args))
    with jax.set_mesh(mesh):
        rows = sharding.local_rows(STUDIES, mesh)
        batch = sharding.global_batch(by_four, rows, STUDIES, mesh)
        state = jax.device_put(state, sharding.of_variables(state, mesh))
        got = whole_loss(graph, material.spec)(state, batch)
    assert (2, 20) in rings  # rows and tokens of a device
    assert_same(jax.device_get(got), jax.device_get(expected))


# ---------------------------------------------------------------- studies of a row do not meet


@pytest.fixture(scope="module")
def outputs(learner, material):
    """Latents and image embeddings of each study, from raw patches in float32."""
    graph, state = nnx.split(learner)

    @jax.jit
    def outputs(batch):
        learner = nnx.merge(graph, state)
        encoded = learner.model.encode(prepare(batch, material.spec, None, None))
        return learner.model.fuse(encoded), learner.tasks["image_text"].pool["image"](encoded["image/ct"])

    return outputs


def with_patches(batch, patches):
    return dataclasses.replace(batch, packed={"ct": dataclasses.replace(batch.packed["ct"], patches=patches)})


def test_whatever_a_neighbour_holds_changes_no_bit_of_a_study(material, by_four, outputs):
    batch = by_four
    part, rng = batch.packed["ct"], np.random.default_rng(5)
    raw = part.patches.astype(np.float32)
    expected = outputs(with_patches(batch, raw))
    for row, place in ((0, 1), (2, 3)):
        assert part.present[4 * row + place - 1]
        other = np.arange(STUDIES) != 4 * row + place - 1
        mine = (np.arange(4)[:, None] == row) & (part.segment == place)
        for value in (np.nan, np.inf, rng.uniform(0, 255, raw.shape)):
            got = outputs(with_patches(batch, np.where(mine[..., None], value, raw).astype(np.float32)))
            for mine_out, out in zip(got, expected):
                np.testing.assert_array_equal(np.asarray(mine_out)[other], np.asarray(out)[other])
                assert np.isfinite(mine_out).all()
        for mine_out, out in zip(got, expected):
            assert np.abs(np.asarray(mine_out - out)[~other]).max() > 1e-4


@pytest.mark.parametrize("implementation", ["xla", "blocks", "splash"])
def test_attention_of_packed_tokens_is_that_of_each_sequence_alone(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 40, 2, 8)).astype(np.float32) for _ in range(3))
    segment = np.array([np.repeat([1, 2, 3, 0], sizes) for sizes in ((9, 13, 9, 9), (13, 13, 9, 5))], np.int32)

    def attend(q, k, v):
        return attention(q, k, v, Segments.packed(jnp.asarray(segment)), implementation=implementation)

    got, back = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
    weight = rng.normal(size=got.shape).astype(np.float32)
    for row, of in np.ndindex(2, 4):
        mine = segment[row] == of
        if of == 0:
            assert not np.asarray(got)[row, mine].any()
            continue
        a, b, c = (jnp.asarray(x[row, mine][None]) for x in (q, k, v))
        alone, own_back = jax.vjp(lambda *x: attention(*x, implementation="xla"), a, b, c)
        np.testing.assert_allclose(np.asarray(got)[row, mine], alone[0], atol=2e-5)
        only = np.zeros_like(weight)
        only[row, mine] = weight[row, mine]
        for mine_grad, own in zip(back(jnp.asarray(only)), own_back(jnp.asarray(weight[row, mine][None]))):
            np.testing.assert_allclose(np.asarray(mine_grad)[row, mine], own[0], atol=5e-5)
            rest = np.ones((2, 40), bool)
            rest[row, mine] = False
            assert not np.asarray(mine_grad)[rest].any()  # no gradient crosses either


# ---------------------------------------------------------------- hiding, padding, accumulation


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1), studies=st.sampled_from([1, 4]), share=st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.95])
)
def test_of_each_study_its_share_is_hidden_and_the_rest_stays(seed, studies, share):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 7, (2, studies))
    tokens = 6 * studies
    segment = np.zeros((2, tokens), np.int32)
    for row in range(2):
        ids = np.repeat(1 + np.arange(studies), sizes[row])
        segment[row, : len(ids)] = ids
    name = np.arange(1, 2 * tokens + 1, dtype=np.float32).reshape(2, tokens, 1)  # each patch holds its number
    part = PackedPart(name, np.repeat(name, 3, axis=2), segment, sizes.reshape(-1) > 0)
    stay, hidden = (
        jax.tree.map(np.asarray, p) for p in hide(part, share, 6, jax.random.split(jax.random.key(seed), 2 * studies))
    )
    for row, of in np.ndindex(2, studies):
        mine = name[row, segment[row] == 1 + of, 0]
        kept, gone = (p.patches[row, p.segment[row] == 1 + of, 0] for p in (stay, hidden))
        assert len(gone) == hidden_of(len(mine), share)
        assert sorted([*kept, *gone]) == list(mine) and (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(stay.centres_mm[..., 0][stay.segment > 0], stay.patches[..., 0][stay.segment > 0])


def test_padding_is_the_share_of_tokens_without_an_image(by_four, material):
    held = np.asarray(by_four.packed["ct"].segment)
    np.testing.assert_allclose(padding(by_four)["padding"], (held == 0).mean(), rtol=1e-6)
    assert padding(material.batch) == {}


def test_accumulated_parts_keep_the_studies_of_a_row_together(by_four):
    batch = by_four
    keys = jax.random.split(jax.random.key(0), STUDIES)
    parts = split(batch, keys, 2)
    for i in range(2):
        part, own = jax.tree.map(lambda x, i=i: x[i], parts)
        of_keys = jax.random.key_data(keys).reshape(4, 4, -1)[i::2].reshape(8, -1)
        np.testing.assert_array_equal(jax.random.key_data(own), of_keys)
        of_rows = batch.study.reshape(4, 4)[i::2].reshape(-1)
        np.testing.assert_array_equal(part.study, of_rows)
        np.testing.assert_array_equal(part.packed["ct"].patches, batch.packed["ct"].patches[i::2])
        np.testing.assert_array_equal(part.packed["ct"].present, part.images.get("ct", part.packed["ct"]).present)
        np.testing.assert_array_equal(
            part.packed["ct"].present, batch.packed["ct"].present.reshape(4, 4)[i::2].reshape(-1)
        )


def test_flops_are_of_all_tokens_that_rows_have_room_for(learner, material):
    width, depth, rows, tokens, studies = 24, 2, 4, 20, 4
    batch = packed(material.batch, material.spec, studies, tokens)
    encoder = learner.model.vision
    part = prepare(batch, material.spec, None, None).packed["ct"]
    long = tokens + 2 * studies  # with registers
    layer = 2 * long * (4 + 8) * width**2 + 4 * long**2 * width
    by_hand = rows * (2 * tokens * 2 * 4 * 4 * width + depth * layer)
    assert model_flops(lambda part: encoder("ct", part).x, part) == by_hand
