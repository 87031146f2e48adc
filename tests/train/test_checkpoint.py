"""Checkpoints: which are kept, what is said of damaged ones, leaves found by name; resuming is tested end to end."""

import itertools
import math
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmfm_jax.config.training import CheckpointConfig
from mmfm_jax.errors import UserError
from mmfm_jax.train.checkpoint import CHECKPOINTS, Checkpoints

LOSS = CheckpointConfig(keep=1)


def tree(seed: int = 0, width: int = 5):
    rng = np.random.default_rng(seed)
    return {
        "params": {"model": {"text": {"kernel": jnp.asarray(rng.normal(size=(3, width)), jnp.float32)}}},
        "optimizer": [{"mu": jnp.asarray(rng.normal(size=width), jnp.bfloat16)}, jnp.int32(seed)],
    }


def shapes(of):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), of)


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def saved(run: Path, config: CheckpointConfig, metrics: list[dict], constant_until: int = 0) -> set[int]:
    """The steps that are kept of 1, 2, ... with these metrics."""
    checkpoints = Checkpoints(run, config, constant_until)
    for step, measured in enumerate(metrics, 1):
        checkpoints.save(step, tree(step), measured)
    checkpoints.close()
    return {int(path.name) for path in (run / CHECKPOINTS).iterdir() if path.name.isdigit()}


@pytest.mark.parametrize("sick", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_none(tmp_path, sick):
    losses = [0.5, sick, 0.7, 0.8]
    assert saved(tmp_path, LOSS, [{"validation/loss": loss} for loss in losses]) == {1, 4}
    again = Checkpoints(tmp_path, LOSS, writes=False)
    assert again.best() == 1 and again.latest() == 4


def test_the_newest_is_the_best_where_none_has_the_metric(tmp_path):
    assert saved(tmp_path, LOSS, [{}, {"validation/other": 3.0}, {"validation/loss": math.nan}]) == {3}
    assert Checkpoints(tmp_path, LOSS, writes=False).best() == 3
    assert Checkpoints(tmp_path, CheckpointConfig(best=None), writes=False).best() == 3


def test_which_way_is_better_follows_from_the_metric_or_is_said(tmp_path):
    def kept(name: str, mode: str) -> set[int]:
        config = CheckpointConfig.model_validate({"keep": 1, "best": name, "best_mode": mode})
        return saved(tmp_path / f"{name}-{mode}", config, [{name: value} for value in (0.5, 0.9, 0.1, 0.4)])

    assert kept("validation/disease/accuracy", "auto") == kept("validation/ct/mean_dice", "auto") == {2, 4}
    assert kept("validation/loss", "auto") == kept("validation/caption/perplexity", "auto") == {3, 4}
    assert kept("validation/loss", "max") == {2, 4} and kept("validation/disease/accuracy", "min") == {3, 4}
    with pytest.raises(ValueError, match="set best_mode to min or max"):
        CheckpointConfig(best="validation/disease/scale")


def test_the_best_may_be_of_another_metric_later_on(tmp_path):
    saved(tmp_path, CheckpointConfig(keep=9), [{"validation/loss": x, "validation/accuracy": x} for x in (0.2, 0.1)])
    assert Checkpoints(tmp_path, LOSS, writes=False).best() == 2
    assert Checkpoints(tmp_path, CheckpointConfig(best="validation/accuracy"), writes=False).best() == 1


def test_the_last_checkpoint_of_the_constant_part_is_kept(tmp_path):
    assert saved(tmp_path, CheckpointConfig(keep=2, best=None), [{}] * 7, constant_until=4) == {4, 6, 7}


def test_reading_leaves_what_is_being_written(tmp_path):
    saved(tmp_path, LOSS, [{}])
    half = tmp_path / CHECKPOINTS / "2.orbax-checkpoint-tmp-0"
    half.mkdir()
    Checkpoints(tmp_path, LOSS, writes=False).close()
    assert half.exists()


def test_each_file_of_a_checkpoint_cut_short_or_lost_is_one_sentence_or_harmless(tmp_path):
    """The state is never another than was saved."""
    saved(tmp_path / "sound", LOSS, [{"validation/loss": 1.0}])
    place = tmp_path / "sound" / CHECKPOINTS / "1"
    files = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
    refused = set()
    for number, (file, cut) in enumerate(itertools.product(files, ("lost", "half", "empty"))):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", run)
        path = run / CHECKPOINTS / "1" / file
        content = path.read_bytes()
        path.unlink() if cut == "lost" else path.write_bytes(content[: len(content) // 2 if cut == "half" else 0])
        checkpoints = Checkpoints(run, LOSS, writes=False)
        try:
            step = checkpoints.best()
            assert step == 1 and same(checkpoints.restore(1, shapes(tree()), None), tree(1)), (file, cut)
        except UserError as error:
            assert "is damaged" in str(error) and "delete this checkpoint" in str(error) and "\n" not in str(error)
            refused.add(str(file))
    arrays = {str(file) for file in files if file.parts[0] == "default"}
    assert {"default/_METADATA", "default/manifest.ocdbt"} <= refused <= arrays
    assert any("/d/" in file for file in refused)


def test_leaves_are_held_by_name_and_what_differs_is_named(tmp_path):
    saved(tmp_path, LOSS, [{}])
    checkpoints = Checkpoints(tmp_path, LOSS, writes=False)
    with ocp.PyTreeCheckpointer() as plain:
        assert list(plain.restore(tmp_path / CHECKPOINTS / "1" / "default")) == [
            "optimizer.0.mu", "optimizer.1", "params.model.text.kernel"
        ]  # fmt: skip
    added, gone = tree(), tree()
    added["params"]["model"]["an_earlier_one"] = jnp.zeros(2)
    del gone["optimizer"][0]["mu"]
    for other, said in {
        "lacks": (added, "it lacks params.model.an_earlier_one;"),
        "surplus": (gone, "it holds besides optimizer.0.mu;"),
        "shape": (tree(width=7), r"params.model.text.kernel \(float32\[3,5\] for float32\[3,7\]\)"),
    }.values():
        with pytest.raises(UserError, match=said):
            checkpoints.restore(1, shapes(other), None)


def test_leaves_that_match_are_read_and_the_others_stay(tmp_path):
    saved(tmp_path, LOSS, [{}])
    checkpoints, mine = Checkpoints(tmp_path, LOSS, writes=False), tree(seed=9)
    mine["params"]["head"] = jnp.ones(2)
    found = checkpoints.restore_matching(1, mine, None, ["params.model.*"])
    assert same(found["params"]["model"], tree(1)["params"]["model"])
    assert same(found["optimizer"], mine["optimizer"]) and same(found["params"]["head"], jnp.ones(2))
    with pytest.raises(UserError, match=r"it lacks params\.head;"):
        checkpoints.restore_matching(1, mine, None, ["params.*"])
    with pytest.raises(UserError, match=r"params\.modle\.\*: fits no name"):
        checkpoints.restore_matching(1, mine, None, ["params.modle.*"])


def test_checkpoints_whose_leaves_are_numbered_can_still_be_read(tmp_path):
    """With metrics where orbax kept them."""
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["validation/loss"], best_mode="min")
    manager = ocp.CheckpointManager(tmp_path / CHECKPOINTS, options=options)
    names = ["optimizer.0.mu", "optimizer.1", "params.model.text.kernel"]
    for step, loss in enumerate((0.1, 0.2), 1):
        leaves = [tree(step)["optimizer"][0]["mu"], tree(step)["optimizer"][1], tree(step)["params"]["model"]["text"]]
        leaves[-1] = leaves[-1]["kernel"]
        numbered = {f"{number:05d}.{name}": leaf for number, (name, leaf) in enumerate(zip(names, leaves))}
        manager.save(step, args=ocp.args.StandardSave(numbered), metrics={"validation/loss": loss})
    manager.close()
    checkpoints = Checkpoints(tmp_path, LOSS)
    assert checkpoints.best() == 1
    assert same(checkpoints.restore(2, shapes(tree()), None), tree(2))
    checkpoints.save(3, tree(3), {"validation/loss": 0.3})
    checkpoints.close()
    assert {int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir()} == {1, 3}


def test_a_save_that_finds_no_room_is_one_sentence_and_leaves_the_checkpoints_before_it(tmp_path, caplog):
    state = {"values": jnp.asarray(np.random.default_rng(0).random(400_000, np.float32))}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(best=None))
    checkpoints.save(1, state, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(UserError, match=r"a checkpoint could not be written \(File too large\)"):
            checkpoints.save(2, state, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not caplog.records  # orbax would print a traceback of each of its threads
    assert Checkpoints(tmp_path, CheckpointConfig(best=None)).latest() == 1
    checkpoints.save(3, state, {})
    checkpoints.close()
    assert Checkpoints(tmp_path, CheckpointConfig(best=None)).latest() == 3
