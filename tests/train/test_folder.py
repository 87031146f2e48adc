"""Where a run may lie, and which changes it may go on with."""

import errno
import os
from pathlib import Path

import pytest

from mmfm_jax.errors import UserError
from mmfm_jax.train import folder
from mmfm_jax.train.folder import check_same, replace, writing
from mmfm_jax.train.place import checked


@pytest.mark.parametrize("field, value", [("mesh.tensor", 2), ("train.log_every", 7), ("checkpoint.keep", 5)])
def test_what_leaves_the_mathematics_alone_may_change(make_experiment, tmp_path, field, value):
    check_same(tmp_path, make_experiment(), make_experiment({field: value}))


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", 3),
        ("model.vision.width", 48),
        ("tasks.masked.image", 0.5),
        ("data.augment.flip", 0.1),
        ("optimizer.learning_rate", 1.0),
    ],
)
def test_what_changes_it_is_named(make_experiment, tmp_path, field, value):
    with pytest.raises(UserError) as error:
        check_same(tmp_path, make_experiment(), make_experiment({field: value}))
    assert field in str(error.value) and "--run" in str(error.value)


def test_all_that_differs_is_said_at_once(make_experiment, tmp_path):
    asked = make_experiment({"seed": 3, "optimizer.learning_rate": 1.0, "train.log_every": 9})
    with pytest.raises(UserError) as error:
        check_same(tmp_path, make_experiment(), asked)
    assert str(error.value).startswith(
        f"{tmp_path / 'config.yaml'}: this run was started with optimizer.learning_rate 0.003 and is now asked to go "
        "on with 1.0, with seed 1 and is now asked to go on with 3; give the same values of these 2 fields"
    )


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "gs:/bucket/run"])
def test_a_bucket_is_refused_before_anything_is_made(monkeypatch, tmp_path, place):
    monkeypatch.chdir(tmp_path)
    for given in (place, Path(place)):
        with pytest.raises(UserError, match="a run lies in a folder of this machine, not in a bucket"):
            checked(given)
        with pytest.raises(UserError, match=f"^{place.partition(':')[0]}://.*/run: a run lies"):
            folder.read(Path(given))
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made, since .*file is a file; give another --run"):
        checked(tmp_path / "file")
    with pytest.raises(UserError, match=r"run: cannot be made, since .*file is a file"):
        checked(tmp_path / "file" / "deep" / "run")
    assert checked(tmp_path / "new" / "run") == tmp_path / "new" / "run" and not (tmp_path / "new").exists()


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match=r"run: cannot be made, since .* may not be written to"):
        checked(tmp_path / "run")


@pytest.mark.parametrize("run", ["/proc/run", "/proc/sys/run", "/dev/null/run"])
def test_where_no_folder_can_be_made_the_run_is_named(run):
    with (
        pytest.raises(
            UserError,
            match=f"^{run}: cannot be (written|made, since /(dev/null is a file|proc/sys may not))",
        ),
        writing(Path(run)),
    ):
        checked(run).mkdir(parents=True)


def test_a_full_disk_is_said_wherever_it_is_met_and_leaves_nothing_half_written(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"config.yaml: cannot be written: No space left on device"):
        replace(tmp_path / folder.CONFIG, "text")
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_elsewhere_is_not_blamed_on_the_run(tmp_path):
    with pytest.raises(FileNotFoundError), writing(tmp_path / "run"):
        (tmp_path / "store" / "volume").read_bytes()
