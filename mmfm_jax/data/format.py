"""What a store looks like on disk or in a bucket: its files, its zarr metadata and `store.json`.

    store.json                       format version, schema, counts and checksums; written last, so it makes the store
    stats.json                       fingerprint of the train split (`stats.py`)
    index.parquet/00000.parquet      patient and split of each study, 65,536 studies a part
    studies.parquet/00000.parquet    texts, table row, labels, and spacing of each image; row groups of 256 studies
    volumes/<role>/0                 all volumes of one shape in one zarr v3 array [study * channel, z, y, x]
    volumes/<role>/<row>/0           or one zarr v3 array [channel, z, y, x] a study

Every group of arrays carries OME-NGFF 0.5 metadata (https://ngff.openmicroscopy.org/0.5/), whose axes put what is not
space first; that is why channels come before z on disk though they come last in memory. Chunks are blosc lz4 with
bitshuffle and a CRC, so a flipped bit is an error and never a voxel. Nothing is pickled.

Ten million studies make 153 parts of each table and, stacked, some 40,000 shards: all that grows in `store.json` is
one checksum for each of those. Checksums of volumes that have an array of their own are in their study's row.
"""

from __future__ import annotations

import functools
import json
from math import ceil, prod
from pathlib import Path
from urllib.parse import unquote, urlparse

import tensorstore as ts
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmfm_jax.data.study import ImageSpec, Schema
from mmfm_jax.errors import UserError

FORMAT_VERSION = 1
PART_STUDIES = 65_536
GROUP_STUDIES = 256
STACKED_CHUNK_VOXELS = 64**3
VOLUME_CHUNK_VOXELS = 32**3  # 96^3 crops are read fastest from chunks of about this size
SHARD_BYTES = 64 * 2**20  # raw; also what the writer buffers of each stacked role


class SplitCounts(BaseModel):
    """How many studies of a split have each part."""

    model_config = ConfigDict(extra="forbid")

    studies: int = 0
    patients: int = 0
    images: dict[str, int] = {}
    texts: dict[str, int] = {}
    labels: dict[str, dict[str, int]] = {}
    """By label, by class name."""


class StoreFile(BaseModel):
    """`store.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    format_version: int = FORMAT_VERSION
    description: str = ""
    source: dict[str, str] = {}
    """What the store was built from and with which settings; holds no secret and no identifier."""
    declared: Schema = Field(validation_alias="schema", serialization_alias="schema")
    counts: dict[str, SplitCounts]
    files: dict[str, str]
    """SHA-256 by path, of every file but this one and volumes with an array of their own."""


@functools.cache
def context() -> ts.Context:
    """The process's one TensorStore context: shared caches, bounded whatever the size of the store."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 128 * 2**20}})


def local_folder(url: str) -> Path | None:
    """The folder a path or file:// URL means; None for any other URL."""
    if "://" not in url:
        return Path(url).expanduser().absolute()
    return Path(unquote(urlparse(url).path)) if url.startswith("file://") else None


def open_kvstore(url: str) -> ts.KvStore:
    """The key-value store at a path or TensorStore URL. Raises UserError for a URL that TensorStore cannot open."""
    folder = local_folder(url)
    spec = {"driver": "file", "path": f"{folder}/"} if folder else url.rstrip("/") + "/"
    try:
        return ts.KvStore.open(spec, context=context()).result()
    except ValueError as error:
        raise UserError(f"{url}: not a folder or a URL that TensorStore can open: {error}") from error


def read_store_file(kvstore: ts.KvStore, url: str) -> StoreFile | None:
    """`store.json`, or None when there is none; `url` is named in errors.

    Raises UserError when it is of a newer format, corrupt or out of reach.
    """
    try:
        found = kvstore.read("store.json").result()
    except ValueError as error:
        raise UserError(f"{url}: cannot be read: {error}") from error
    if found.state == "missing":
        return None
    try:
        raw = json.loads(found.value)
        version = raw["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{url}/store.json: has format version {version} and this release reads up to {FORMAT_VERSION}; "
                "upgrade mmfm_jax or build the store again"
            )
        return StoreFile.model_validate(raw)
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url}/store.json: is not a valid store description; build the store again") from error


def chunk_shape(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Halves the longest axis of `shape` until a chunk has at most `limit` voxels."""
    chunk = list(shape)
    while prod(chunk) > limit and max(chunk) > 1:
        axis = chunk.index(max(chunk))
        chunk[axis] = ceil(chunk[axis] / 2)
    return tuple(chunk)


def stacked_studies_per_shard(spec: ImageSpec, itemsize: int) -> int:
    """Studies of a stacked role that share one file."""
    assert spec.shape is not None
    return max(1, min(4096, SHARD_BYTES // (prod(spec.shape) * spec.channels * itemsize)))


def array_spec(kvstore: ts.KvStore, path: str) -> dict:
    """TensorStore spec of the array at `path`, to open or, with `array_metadata`, to create.

    The writer stores every chunk, so on reading a missing chunk is an error and not silently zeros; and since nothing
    ever changes in a finished store, what is cached is never checked again.
    """
    return {
        "driver": "zarr3",
        "kvstore": (kvstore / f"{path}/").spec().to_json(),
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
    }


def array_metadata(spec: ImageSpec, shape: tuple[int, int, int], studies_per_shard: int | None) -> dict:
    """zarr v3 metadata of a stacked array, still of no studies, or (`studies_per_shard` None) of one volume.

    `shape`: voxels z y x.
    """
    stacked = studies_per_shard is not None
    chunk = chunk_shape(shape, max(1, (STACKED_CHUNK_VOXELS if stacked else VOLUME_CHUNK_VOXELS) // spec.channels))
    # A stacked shard holds whole studies; one of a single volume is at most about 256 voxels along an axis.
    per_axis = [ceil(s / c) if stacked else min(ceil(s / c), max(1, 256 // c)) for s, c in zip(shape, chunk)]
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"}},
        {"name": "crc32c"},
    ]
    sharding = {"chunk_shape": [spec.channels, *chunk], "codecs": codecs}
    shard = [spec.channels * (studies_per_shard or 1), *(n * c for n, c in zip(per_axis, chunk))]
    return {
        "shape": [0 if stacked else spec.channels, *shape],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "dimension_names": ["study" if stacked else "channel", "z", "y", "x"],
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def group_metadata(role: str, first_axis: str = "", spacing_mm: tuple[float, float, float] | None = None) -> bytes:
    """`zarr.json` of a group: plain, or with an array `0` described to OME-NGFF 0.5 readers if `first_axis` is named.

    `first_axis`: "study" (of no type that NGFF knows) or "channel". `spacing_mm`: of z y x; None when the studies of a
    stacked array differ, and then the scale is in voxels and the spacing of each study is in its row.
    """
    document: dict = {"zarr_format": 3, "node_type": "group"}
    if first_axis:
        unit = {"unit": "millimeter"} if spacing_mm else {}
        first = {"name": first_axis, "type": "channel"} if first_axis == "channel" else {"name": first_axis}
        scale = [1.0, *(spacing_mm or (1.0, 1.0, 1.0))]
        multiscale = {
            "name": role,
            "axes": [first, *({"name": axis, "type": "space", **unit} for axis in "zyx")],
            "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}],
        }
        document["attributes"] = {"ome": {"version": "0.5", "multiscales": [multiscale]}}
    return json.dumps(document, indent=1).encode()
