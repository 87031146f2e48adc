"""A disk that cannot take a checkpoint; resuming is tested end to end."""

import resource
from typing import cast

import jax.numpy as jnp
import numpy as np
import pytest

from mmfm_jax.config.training import CheckpointConfig
from mmfm_jax.errors import UserError
from mmfm_jax.train.checkpoint import Checkpoints
from mmfm_jax.train.state import TrainState


def test_a_save_that_finds_no_room_is_one_sentence_and_leaves_the_checkpoints_before_it(tmp_path, caplog):
    state = cast(TrainState, {"values": jnp.asarray(np.random.default_rng(0).random(400_000, np.float32))})
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
