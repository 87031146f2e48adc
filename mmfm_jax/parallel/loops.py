"""Loops whose turns hold collectives."""

from __future__ import annotations

from typing import Any

import jax

from mmfm_jax.parallel.platform import platform


def scan(body, init, xs=None, length: int | None = None, unroll: int = 1) -> Any:
    """`jax.lax.scan`, and no loop at all where a mesh of CPU devices is in force.

    XLA's CPU runtime runs the collectives of a program in the program's order (its thunks take turns at one
    communicator), but not those inside a loop: once a part of it has been handed to another thread, the loop counts as
    having had its turn. Then one device waits in the loop for a second, and that one, in a collective from outside the
    loop, for the first. To be used for every loop whose turns the partitioner or `shard_map` may give a collective.
    """
    several = jax.sharding.get_abstract_mesh().size > 1
    return jax.lax.scan(body, init, xs, length, unroll=True if several and platform() == "cpu" else unroll)
