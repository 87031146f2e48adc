"""A run's folder tells what made it, and a run that goes on tells what changed."""

import json

import jax
import pytest

import mmfm_jax
from mmfm_jax.config.data import DataConfig
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.train import versions
from mmfm_jax.train.versions import changed, current, record


@pytest.fixture(scope="module")
def store(small_store):
    return StudyStore.open(small_store)


def test_releases_and_store_are_kept_with_the_run(store, tmp_path):
    record(tmp_path, current(store))
    record(tmp_path, current(store))
    (entry,) = json.loads((tmp_path / "versions.json").read_text())
    assert entry["releases"]["mmfm_jax"] == mmfm_jax.__version__ and entry["releases"]["jax"] == jax.__version__
    assert entry["releases"]["python"].startswith("3.") and entry["stores"]["store"]["studies"] == 120
    assert not changed(tmp_path, current(store))


def test_another_release_and_another_store_are_one_line_each(store, make_small_store, monkeypatch, tmp_path):
    record(tmp_path, current(store))
    monkeypatch.setattr(versions, "__version__", "9.9")
    now = current(StudyStore.open(make_small_store(100)))
    of_releases, of_store = changed(tmp_path, now)
    assert f"(mmfm_jax {mmfm_jax.__version__} is now 9.9)" in of_releases
    assert "(store.json differs: store had 120 studies and has 100)" in of_store
    record(tmp_path, now)
    assert not changed(tmp_path, now) and len(json.loads((tmp_path / "versions.json").read_text())) == 2


def test_a_store_that_moved_is_the_same_store(store, small_store, tmp_path):
    record(tmp_path, current(store))
    assert not changed(tmp_path, current(StudyStore.open(f"file://{small_store}")))


def test_each_store_of_a_mix_is_known_by_its_name(small_store, make_small_store, tmp_path):
    def mixed(second: str):
        return current(
            open_data(DataConfig.model_validate({"mix": {"a": {"store": small_store}, "b": {"store": second}}}))
        )

    record(tmp_path, mixed(small_store))
    (told,) = changed(tmp_path, mixed(make_small_store(40)))
    assert "(store.json differs: b had 120 studies and has 40)" in told


@pytest.mark.parametrize("held", [None, "", "{}", "[1]", "[]"])
def test_a_run_that_kept_no_releases_goes_on_and_keeps_them_from_now_on(store, tmp_path, held):
    if held is not None:
        (tmp_path / "versions.json").write_text(held)
    assert not changed(tmp_path, current(store))
    record(tmp_path, current(store))
    assert len(json.loads((tmp_path / "versions.json").read_text())) == 1
