"""Random studies of a schema that has every kind of part, and a store of them."""

from collections.abc import Callable

import numpy as np
import pytest

from mmfm_jax.data.store import StudyStore, write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, Schema, Study

SCHEMA = Schema(
    images={
        "nodule": ImageSpec(dtype="uint8", shape=(6, 5, 4)),
        "photo": ImageSpec(dtype="uint8", shape=(1, 8, 7), channels=3),
        "ct": ImageSpec(dtype="int16", shape=None),
    },
    texts={"report": "what was seen", "history": "what came before"},
    columns={
        "age": ColumnSpec(kind="number", unit="years"),
        "sex": ColumnSpec(kind="category", vocabulary=("female", "male")),
    },
    labels={"malignancy": LabelSpec(classes=("benign", "malignant"))},
)


@pytest.fixture(scope="session")
def schema() -> Schema:
    return SCHEMA


@pytest.fixture(scope="session")
def make_studies() -> Callable[..., list[Study]]:
    """`make_studies(n, seed, present)`: random studies, each part of which is there with chance `present`."""

    def make(n: int, seed: int = 0, present: float = 0.6) -> list[Study]:
        rng = np.random.default_rng(seed)

        def some(held: dict) -> dict:
            return {name: value for name, value in held.items() if rng.random() < present}

        def image(spec: ImageSpec) -> Image:
            z, y, x = spec.shape or rng.integers(1, 70, 3)
            dtype = np.iinfo(spec.dtype)
            voxels = rng.integers(dtype.min, dtype.max, (z, y, x, spec.channels), spec.dtype, endpoint=True)
            z_mm, y_mm, x_mm = rng.uniform(0.5, 3, 3).tolist()
            return Image(voxels, (z_mm, y_mm, x_mm))

        return [
            Study(
                patient=f"patient{i // 2}",
                split=("train", "train", "test")[i // 2 % 3],
                images={role: image(spec) for role, spec in some(SCHEMA.images).items()},
                texts=some({f: tuple(f"Seen {k}. Naïve «{i}».\n" for k in range(i % 3 + 1)) for f in SCHEMA.texts}),
                row=some({"age": rng.normal(60, 10), "sex": str(rng.choice(["female", "male"]))}),
                labels=some({"malignancy": int(rng.integers(2))}),
            )
            for i in range(n)
        ]

    return make


@pytest.fixture(scope="session")
def assert_holds() -> Callable[[StudyStore, list[Study]], None]:
    """Fails unless a store gives back exactly these studies."""

    def check(store: StudyStore, studies: list[Study]) -> None:
        assert len(store) == len(studies)
        assert store.patients(np.arange(len(studies))).tolist() == [study.patient for study in studies]
        for row, study in enumerate(studies):
            assert row in store.rows(study.split)
            assert store.table(row) == (study.texts, study.row, study.labels)
            for role in SCHEMA.images:
                info = store.volume_info(role, row)
                if role not in study.images:
                    assert info is None
                    continue
                assert info is not None
                image = study.images[role]
                assert info == (image.voxels.shape[:3], image.spacing_mm)
                voxels = store.crop(role, row, (0, 0, 0), info[0])
                assert voxels.dtype == image.voxels.dtype
                np.testing.assert_array_equal(voxels, image.voxels)

    return check


@pytest.fixture(scope="session")
def studies(make_studies) -> list[Study]:
    return make_studies(40)


@pytest.fixture
def store(tmp_path, studies) -> StudyStore:
    url = str(tmp_path / "store")
    write_store(url, SCHEMA, studies)
    return StudyStore.open(url)
