"""The summary of a store tells what it holds and nothing of who is in it."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from mmfm_jax.data.inspect.summary import summary
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import LabelSpec, Schema, Study


def shown(store: StudyStore) -> str:
    out = StringIO()
    Console(file=out, width=160).print(summary(store))
    return out.getvalue()


@pytest.fixture
def lines(store) -> list[list[str]]:
    """Words of each line of the summary."""
    return [line.split() for line in shown(store).splitlines()]


def test_every_part_is_there_with_its_numbers(store, studies, lines):
    for split in ("train", "test"):
        held = [s for s in studies if s.split == split]
        images = [sum(role in s.images for s in held) for role in store.schema.images]
        texts = [sum(field in s.texts for s in held) for field in store.schema.texts]
        masks = [sum(name in s.masks for s in held) for name in store.schema.masks]
        numbers = [len({s.patient for s in held}), len(held), *images, *texts, *masks]
        assert [split, *map(str, numbers)] in lines
    assert any(line[:7] == ["nodule", "uint8", "1", "6", "x", "5", "x"] for line in lines)
    age = store.stats.numbers["age"]
    assert ["age", "years", *(f"{v:.4g}" for v in (age.mean, age.sd, age.low, age.high)), str(age.missing)] in lines
    spleen = [(s.masks["organs"] == 2).sum() for s in studies if s.split == "train" and "organs" in s.masks]
    there = [n for n in spleen if n]
    mean = f"{sum(there) / len(there):,.0f}"
    assert ["organs", "ct", "spleen", str(len(there)), "of", str(len(spleen)), mean] in lines
    assert ["sex", "female", str(store.stats.categories["sex"].counts["female"])] in lines
    malignant = [str(store.counts[split].labels["malignancy"]["malignant"]) for split in ("test", "train")]
    assert ["malignancy", "malignant", *malignant] in lines or ["malignant", *malignant] in lines


def test_no_patient_and_no_text_is_shown(store, studies):
    text = shown(store)
    assert not any(patient in text for patient in store.patients(np.arange(len(store))))
    assert "Seen" not in text


def test_a_store_of_labels_alone_has_no_empty_tables(tmp_path):
    schema = Schema(labels={"dead": LabelSpec(classes=("no", "yes"))})
    write_store(str(tmp_path / "store"), schema, [Study("p", "train", labels={"dead": 1}), Study("q", "test")])
    text = shown(StudyStore.open(str(tmp_path / "store")))
    assert "Labels" in text and "unlabelled" in text
    assert not any(title in text for title in ("Images", "Texts", "Numbers", "Categories", "Masks"))
