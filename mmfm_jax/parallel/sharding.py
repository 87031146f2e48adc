"""The one table from logical axes to mesh axes, and everything that is sharded by it.

Parameters carry the names of their axes (model/parameter.py) and activations are named where
they are constrained; neither knows the mesh. To shard differently, change this table.
"""

from __future__ import annotations

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


def split_over(axis: str, size: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether a logical axis of this size lies on more than one device."""
    ways = math.prod(mesh.shape[name] for name in RULES[axis])
    return ways > 1 and size % ways == 0


def lacking(axis: str, size: int) -> int:
    """How many more of a logical axis it takes for the mesh in force to divide them; without a mesh none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 0 if mesh.empty else -size % math.prod(mesh.shape[name] for name in RULES[axis])


def constrain(x: Any, *axes: str | None) -> jax.Array:
    """Keeps an activation split along its logical axes; without a mesh (`jax.set_mesh`) it returns `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))


def by_study(mesh: Mesh) -> NamedSharding:
    """Batches: leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_variables(variables: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of each parameter or buffer, as a tree of the same structure; one that names no axes is whole on
    every device. `variables` may be shapes alone."""
    shardings = [
        NamedSharding(mesh, partition(variable.get_metadata().get("axes", ()), variable.get_value().shape, mesh))
        for _, variable in nnx.to_flat_state(variables)
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), shardings)


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh | AbstractMesh, studies_a_row: int = 1) -> None:
    """Raises UserError when a batch does not split evenly over the devices; studies of one row are not parted."""
    pieces = math.prod(mesh.shape[name] for name in RULES["batch"])
    if batch_size % (pieces * accumulate * studies_a_row):
        parts = f" in {accumulate} accumulated parts" if accumulate > 1 else ""
        packed = f", packed {studies_a_row} studies a row," if studies_a_row > 1 else ""
        raise UserError(
            f"train.batch_size: {batch_size}{packed}{parts} does not split over mesh data x fsdp = {pieces} shards; "
            f"make it a multiple of {pieces * accumulate * studies_a_row}"
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Rows of a global batch that this process's devices hold, ascending; what it must read and nothing more."""
    indices = by_study(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in indices.values()]
    return np.unique(np.concatenate(rows))


def global_batch(local, rows: np.ndarray, batch_size: int, mesh: Mesh):
    """Joins the rows each process read (`local`, leading axis as `rows`) into arrays over the whole mesh.

    An array of fewer rows has one for several consecutive `rows`, as packed images have.
    """
    sharding = by_study(mesh)

    def join(leaf: np.ndarray) -> jax.Array:
        studies = len(rows) // len(leaf)
        held, count = rows[::studies] // studies, batch_size // studies
        return jax.make_array_from_callback(
            (count, *leaf.shape[1:]),
            sharding,
            lambda index: leaf[_positions(held, (index or (slice(None),))[0], count)],
        )

    return jax.tree.map(join, local)


def _positions(rows: np.ndarray, wanted: slice, batch_size: int) -> slice:
    """Where the contiguous global rows `wanted` stand among `rows`."""
    start, stop, _ = wanted.indices(batch_size)
    at = int(np.searchsorted(rows, start))
    return slice(at, at + stop - start)


def like_parameters(state, params: nnx.State, shardings: nnx.State, mesh: Mesh):
    """Shardings of a state that holds trees like the parameters or like some of them (moments) among other leaves: a
    leaf at a parameter's path, of its shape, is split as the parameter is. All may be shapes alone."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    known = {path: (leaf.shape, split) for (path, leaf), split in zip(paths, jax.tree.leaves(shardings), strict=True)}

    def shard(path, leaf) -> NamedSharding:
        shape, split = next((known[path[i:]] for i in range(len(path)) if path[i:] in known), (None, None))
        return split if split is not None and shape == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(shard, state)
