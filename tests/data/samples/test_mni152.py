"""Blocks of the brain template hold its own voxels and tissues, and what is said of them is so."""

import importlib.util
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmfm_jax.data.samples import mni152
from mmfm_jax.data.samples.mni152 import BLOCK, Block, blocks, build_mni152, read_template
from mmfm_jax.data.split import pseudonym
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError

nib = pytest.importorskip("nibabel")
if importlib.util.find_spec("nilearn") is None:
    pytest.skip("nilearn is not installed (pip install 'mmfm_jax[samples]')", allow_module_level=True)
KEY = "a key"
EVERYTHING = ((0, 0, 0), (BLOCK, BLOCK, BLOCK))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> StudyStore:
    out = tmp_path_factory.mktemp("built") / "mni152"
    assert build_mni152(str(out), KEY, Console(file=StringIO()))
    assert [path.name for path in out.parent.iterdir()] == ["mni152"]
    return StudyStore.open(str(out))


@pytest.fixture(scope="module")
def maps() -> dict[str, np.ndarray]:
    """The files of the wheel as nibabel gives them, [x, y, z], and their affine."""
    spec = importlib.util.find_spec("nilearn")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "datasets/data"
    held = {n: nib.load(folder / f"mni_icbm152_{n}_tal_nlin_sym_09a_converted.nii.gz") for n in ("t1", "gm", "wm")}
    return {name: np.asanyarray(image.dataobj) for name, image in held.items()} | {"affine": held["t1"].affine}


@pytest.fixture(scope="module")
def placed(store) -> list[tuple[Block, int]]:
    """Each block with its row: of a region the left side comes first."""
    patients = store.patients(np.arange(len(store))).tolist()
    held: dict[str, list[Block]] = {}
    for block in blocks(read_template()):
        held.setdefault(pseudonym(block.region, KEY), []).append(block)
    assert sorted(patients) == sorted(patient for patient, of in held.items() for _ in of)
    return [(held[patient].pop(0), row) for row, patient in enumerate(patients)]


def mm(block: Block, affine: np.ndarray) -> np.ndarray:
    """x y z of the middle of a block, by nibabel."""
    return nib.affines.apply_affine(affine, np.array(block.start[::-1]) + (BLOCK - 1) / 2)


def test_voxels_masks_and_volumes_are_those_of_the_template_at_that_place(store, maps, placed):
    store.verify()
    for block, row in placed:
        z, y, x = block.start
        cut = {n: maps[n][x : x + BLOCK, y : y + BLOCK, z : z + BLOCK].T.astype(float) for n in ("t1", "gm", "wm")}
        np.testing.assert_array_equal(store.crop("t1", row, *EVERYTHING)[..., 0], cut["t1"])
        other = 255 - cut["gm"] - cut["wm"]
        likeliest = np.stack([np.full(other.shape, 127.4), cut["gm"] + cut["wm"]]).argmax(0)
        expected = np.where(likeliest, 1 + np.stack([cut["gm"], cut["wm"]]).argmax(0), 0)
        np.testing.assert_array_equal(store.mask_crop("tissue", row, *EVERYTHING), expected)
        _, volumes, _ = store.table(row)
        assert volumes["grey_matter_ml"] == pytest.approx((cut["gm"] / 255).sum() / 1000)
        assert volumes["white_matter_ml"] == pytest.approx((cut["wm"] / 255).sum() / 1000)


def test_what_is_said_of_a_block_is_so(store, maps, placed):
    for block, row in placed:
        x, y, z = mm(block, maps["affine"])
        texts, volumes, _ = store.table(row)
        (said,) = texts["description"]
        assert (f"{block.side} side" in said) and (block.side == "left") == (x < 0)
        assert ("in front of" in said) == (y > 0) and ("above" in said) == (z > 0)
        grey, white = (float(volumes[f"{tissue}_matter_ml"]) for tissue in ("grey", "white"))
        assert ("mostly grey matter." in said) == (grey > 1.5 * white)
        assert ("mostly white matter." in said) == (white > 1.5 * grey)
    assert len({store.table(row)[0]["description"] for _, row in placed}) > 10


def test_no_voxel_is_in_two_blocks_and_mirror_images_are_in_one_split(store, maps, placed):
    taken = np.zeros(maps["t1"].shape, int)
    split_of = {row: split for split in store.counts for row in store.rows(split).tolist()}
    splits: dict[tuple, set] = {}
    for block, row in placed:
        z, y, x = block.start
        taken[x : x + BLOCK, y : y + BLOCK, z : z + BLOCK] += 1
        mirrored = tuple(np.abs(mm(block, maps["affine"])) * [1, 0, 0] + mm(block, maps["affine"]) * [0, 1, 1])
        splits.setdefault(mirrored, set()).add(split_of[row])
    assert taken.max() == 1 and len(splits) < len(store) and all(len(held) == 1 for held in splits.values())
    brain = maps["gm"].astype(int) + maps["wm"] > 127
    assert (taken[brain] == 1).mean() > 0.8


def test_it_says_that_it_is_one_brain_and_that_texts_are_derived(store):
    for text in (store.file.description, mni152.__doc__):
        said = " ".join((text or "").split())
        assert "There is one brain" in said and "derived" in said
    assert "Derived" in store.schema.texts["description"] and "McConnell" in store.file.source["data"]


def test_a_second_call_does_nothing_and_another_key_is_refused(store, monkeypatch):
    monkeypatch.setattr(mni152, "read_template", lambda: pytest.fail("the template was read again"))
    assert not build_mni152(store.url, KEY)
    with pytest.raises(UserError, match="already holds a store with another source, split key"):
        build_mni152(store.url, "another")


def test_without_nilearn_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install 'mmfm_jax\[samples\]'`"):
        build_mni152(str(tmp_path / "mni152"), KEY, Console(file=StringIO()))
    assert not list(tmp_path.iterdir())
