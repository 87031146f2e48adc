"""The one table from logical axes to mesh axes, and everything that is sharded by it.

Parameters carry the names of their axes (`nnx.Param(value, axes=("width", "mlp"))`) and activations are named where
they are constrained; neither knows the mesh. To shard differently, change this table.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mmfm_jax.errors import UserError

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # studies
    "tokens": ("sequence",),  # of activations
    "width": ("fsdp",),  # of parameters: what every token carries through the residual stream
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocabulary": ("tensor",),
}
"""Mesh axes that a logical axis is split over; an axis that is not named here is whole on every device."""


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The split of an array with these logical axes. An axis whose size the mesh does not divide stays whole.

    Arrays may have one axis more than names: the stack of layers in front, which is whole.
    """
    axes = (None,) * (len(shape) - len(axes)) + axes
    split = []
    for axis, size in zip(axes, shape, strict=True):
        names = RULES.get(axis or "", ())
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        split.append(names if names and divides else None)
    return PartitionSpec(*split)


def constrain(x: Any, *axes: str | None) -> jax.Array:
    """Keeps an activation split along its logical axes; without a mesh (`jax.set_mesh`) it returns `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))


def by_study(mesh: Mesh) -> NamedSharding:
    """Batches: leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_parameters(params: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of each parameter, as a tree of the same structure. `params` may be shapes alone."""
    shardings = [
        NamedSharding(mesh, partition(variable.get_metadata()["axes"], variable.get_value().shape, mesh))
        for _, variable in nnx.to_flat_state(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError when a batch does not split evenly over the devices."""
    pieces = math.prod(mesh.shape[name] for name in RULES["batch"])
    if batch_size % (pieces * accumulate):
        parts = f" in {accumulate} accumulated parts" if accumulate > 1 else ""
        raise UserError(
            f"train.batch_size: {batch_size}{parts} does not split over mesh data x fsdp = {pieces} shards; "
            f"make it a multiple of {pieces * accumulate}"
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Rows of a global batch that this process's devices hold, ascending; what it must read and nothing more."""
    indices = by_study(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in indices.values()]
    return np.unique(np.concatenate(rows))


def global_batch(local, rows: np.ndarray, batch_size: int, mesh: Mesh):
    """Joins the rows each process read (`local`, leading axis as `rows`) into arrays over the whole mesh."""
    sharding = by_study(mesh)

    def join(leaf: np.ndarray) -> jax.Array:
        shape = (batch_size, *leaf.shape[1:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: leaf[_positions(rows, (index or (slice(None),))[0], batch_size)]
        )

    return jax.tree.map(join, local)


def _positions(rows: np.ndarray, wanted: slice, batch_size: int) -> slice:
    """Where the contiguous global rows `wanted` stand among `rows`."""
    start, stop, _ = wanted.indices(batch_size)
    at = int(np.searchsorted(rows, start))
    return slice(at, at + stop - start)


def like_parameters(state, params: nnx.State, shardings: nnx.State, mesh: Mesh):
    """Shardings of a state that holds trees shaped like the parameters (moments, averages) among other leaves."""
    structure = jax.tree.structure(params)

    def is_parameters(node) -> bool:
        return isinstance(node, nnx.State) and jax.tree.structure(node) == structure

    def shard(node):
        return shardings if is_parameters(node) else jax.tree.map(lambda _: replicated(mesh), node)

    return jax.tree.map(shard, state, is_leaf=lambda node: is_parameters(node) or not _has_children(node))


def _has_children(node) -> bool:
    return isinstance(node, (tuple, list, dict)) or dataclasses.is_dataclass(node)
