"""What a crop at a random place costs to read from sharded zarr: requests and bytes, counted over places drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
import tensorstore as ts

from mmfm_jax.data.store.format import array_metadata, stacked_studies_per_shard
from mmfm_jax.data.study import ImageSpec

Extent = tuple[int, int, int]
SHARD_VOXELS = 256  # along an axis at most, as the writer has it
INDEX_BYTES = 16  # of a shard, for each of its chunks
PLACES = 400  # drawn for a mean
SLAB = 8  # slices of a chunk that spans whole slices


@dataclass(frozen=True)
class Layout:
    """How the volumes of an image role lie on disk; extents in voxels z y x."""

    shape: Extent
    """Of a volume."""
    chunk: Extent
    shard: Extent
    studies: int | None
    """Of a shard, where the volumes of all studies are one array; None where each has its own."""
    voxel_bytes: int
    """Of all channels."""

    @property
    def chunk_bytes(self) -> int:
        """Decoded."""
        return prod(self.chunk) * self.voxel_bytes

    @property
    def index_bytes(self) -> int:
        chunks = prod(ceil(s / c) for s, c in zip(self.shard, self.chunk)) * (self.studies or 1)
        return INDEX_BYTES * chunks + 4  # and a checksum


@dataclass(frozen=True)
class Cost:
    """Of a crop, in the mean."""

    requests: float
    chunks: float
    voxels: float
    """Of these chunks that lie in the volume; what they hold beyond it compresses to nothing."""
    index_bytes: float


def written(spec: ImageSpec, shape: Extent) -> Layout:
    """As the writer lays out volumes of `shape`: stacked where `spec` says that all have it."""
    per_shard = stacked_studies_per_shard(spec, np.dtype(spec.dtype).itemsize) if spec.shape else None
    metadata = array_metadata(spec, shape, per_shard)
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"][1:]
    chunk = metadata["codecs"][0]["configuration"]["chunk_shape"][1:]
    return Layout(shape, tuple(chunk), tuple(shard), per_shard, spec.channels * np.dtype(spec.dtype).itemsize)


def found(array: ts.TensorStore, shape: Extent, spec: ImageSpec) -> Layout:
    """As an array [channel or study * channel, z, y, x] of a store lies."""
    of = array.chunk_layout
    chunk, shard = (tuple(int(n or 1) for n in grid.shape or ()) for grid in (of.read_chunk, of.write_chunk))
    studies = shard[0] // spec.channels if spec.shape else None
    voxel_bytes = spec.channels * np.dtype(spec.dtype).itemsize
    return Layout(shape, _extent(chunk), _extent(shard), studies, voxel_bytes)


def _extent(grid: tuple[int, ...]) -> Extent:
    _, z, y, x = grid
    return z, y, x


def with_chunk(layout: Layout, chunk: Extent) -> Layout:
    """The same volumes, each an array of its own, in chunks of another extent and shards of as many as fit."""
    fits = [min(c, s) for c, s in zip(chunk, layout.shape)]
    shard = [c * min(ceil(s / c), max(1, SHARD_VOXELS // c)) for s, c in zip(layout.shape, fits)]
    return Layout(layout.shape, (fits[0], fits[1], fits[2]), (shard[0], shard[1], shard[2]), None, layout.voxel_bytes)


def candidates(layout: Layout) -> dict[str, Layout]:
    """Other chunks for volumes that have an array of their own: cubes, and slabs of whole slices."""
    chunks = {f"{n}^3": (n, n, n) for n in (32, 48, 64, 96, 128)}
    chunks["whole slices"] = (SLAB, *layout.shape[1:])
    return {name: with_chunk(layout, chunk) for name, chunk in chunks.items()}


def mean_cost(layouts: Iterable[Layout], size: Extent, random: bool = True, seed: int = 0) -> Cost:
    """Of crops of `size` voxels at random places (or the centre) of volumes of these layouts, equally many of each."""
    layouts = list(layouts)
    rng, costs = np.random.default_rng(seed), []
    for layout in layouts:
        room = [max(s - n, 0) for s, n in zip(layout.shape, size)]
        for _ in range(max(PLACES // len(layouts), 1) if random else 1):
            start = [int(rng.integers(r + 1)) if random else r // 2 for r in room]
            costs.append(cost(layout, start, size))
    means = np.mean([(c.requests, c.chunks, c.voxels, c.index_bytes) for c in costs], axis=0)
    return Cost(*(float(mean) for mean in means))


def cost(layout: Layout, start: Iterable[int], size: Extent) -> Cost:
    """Of one crop that starts at `start` and ends with the volume at the latest, with nothing cached.

    TensorStore asks for the metadata of an array that it has not open, for the index of each shard that is touched,
    and once for chunks that lie one behind the other in their shard; a shard of which every chunk is touched is read in
    one piece. A shard holds its chunks with x as the fastest axis.
    """
    axes = [_touched(*of) for of in zip(start, size, layout.shape, layout.chunk, layout.shard)]
    slots = prod(s // c for s, c in zip(layout.shard, layout.chunk)) * (layout.studies or 1)
    requests = 0 if layout.studies else 1
    chunks = voxels = shards = 0
    for (nz, _, z), (ny, whole_y, y), (nx, whole_x, x) in itertools.product(*axes):
        shards += 1
        chunks += nz * ny * nx
        voxels += z * y * x
        if nz * ny * nx == slots:
            requests += 1
        else:
            requests += 1 + (nz * ny if not whole_x else nz if not whole_y else 1)
    return Cost(requests, chunks, voxels, shards * layout.index_bytes)


def _touched(start: int, size: int, extent: int, chunk: int, shard: int) -> list[tuple[int, bool, int]]:
    """Along one axis, of each shard that is touched: how many of its chunks are, whether these are all that it holds,
    and how many voxels of the volume lie in them."""
    stop, found = min(start + size, extent), []
    for number in range(start // shard, (stop - 1) // shard + 1):
        low, high = number * shard, min((number + 1) * shard, extent)
        first, last = max(start, low) // chunk, (min(stop, high) - 1) // chunk
        count = last - first + 1
        voxels = min((last + 1) * chunk, high) - first * chunk
        found.append((count, count == ceil((high - low) / chunk), voxels))
    return found
