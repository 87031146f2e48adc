"""What a store looks like on disk or in a bucket: its files, its zarr metadata and `store.json`.

    store.json                       format version, schema, counts and checksums; written last, so it makes the store
    stats.json                       fingerprint of the train split (`stats.py`)
    index.parquet/00000.parquet      patient, share (`split.share_of`) and split of each study, 65,536 studies a part
    studies.parquet/00000.parquet    texts, table row, labels, and spacing of each image; row groups of 256 studies
    rows/00000.rows                  the same once more, each study where it is read alone (`record_files.py`)
    volumes/<role>/0                 all volumes of one shape in one zarr v3 array [study * channel, z, y, x]
    volumes/<role>/<row>/0           or one zarr v3 array [channel, z, y, x] a study
    volumes/.../labels/<mask>/0      a mask, in the group of its image, in the same layout
    intensities/<role>               at even places of each image (`foreground.py`), [study, 2048]
    positions/<mask>                 sampled places of each class of a mask (`masks.py`), [study * class, 1000, z y x]

Every group of arrays carries OME-NGFF 0.5 metadata (https://ngff.openmicroscopy.org/0.5/), whose axes put what is not
space first; that is why channels come before z on disk though they come last in memory. Chunks are blosc lz4 with
bitshuffle and a CRC, so a flipped bit is an error and never a voxel. Nothing is pickled.

Ten million studies make 153 parts of each table and of the rows and, stacked, some 40,000 shards: all that grows in
`store.json` is one checksum for each of those. Checksums of volumes that have an array of their own, with their masks,
are in their study's row.

Version 2 added masks and samples of intensity, version 3 `rows` and the share. A release reads every version up to its
own.
"""

from __future__ import annotations

import functools
import json
import os
from math import ceil, prod
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlparse

import tensorstore as ts
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmfm_jax.data.store.foreground import SAMPLED
from mmfm_jax.data.store.masks import POSITIONS
from mmfm_jax.data.study import ImageSpec, MaskSpec, PartName, Schema
from mmfm_jax.errors import UserError

FORMAT_VERSION = 3
ROWS_VERSION = 3  # the first whose studies are read alone
PART_STUDIES = 65_536
GROUP_STUDIES = 256
STACKED_CHUNK_VOXELS = 64**3
VOLUME_CHUNK_VOXELS = 32**3  # 96^3 crops are read fastest from chunks of about this size
CACHE_BYTES = 128 * 2**20  # of chunks and shard indices that a process keeps, unless told otherwise
SHARD_BYTES = 64 * 2**20  # raw; also what the writer buffers of each stacked role
JSON_BYTES = 128 * 2**20
MOST_CHUNK_BYTES = 256 * 2**20  # decoded, of a chunk that is read: a hundred times what the writer makes
SHARD_SAMPLES = 1024  # classes of studies whose positions share a file: 12 MB raw, and an index of 16 KiB
_MOST_IN_SHARD = 2**22
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"}},
    {"name": "crc32c"},
]


Number = Annotated[int, Field(ge=0, le=10**10)]


class SplitCounts(BaseModel):
    """How many studies of a split have each part."""

    model_config = ConfigDict(extra="forbid")

    studies: Number = 0
    patients: Number = 0
    images: dict[str, Number] = {}
    texts: dict[str, Number] = {}
    labels: dict[str, dict[str, Number]] = {}
    """By label, by class name."""
    masks: dict[str, Number] = {}


class StoreFile(BaseModel):
    """`store.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    description: str = ""
    source: dict[str, str] = {}
    """What the store was built from and with which settings; holds no secret and no identifier."""
    declared: Schema = Field(validation_alias="schema", serialization_alias="schema")
    counts: Annotated[dict[PartName, SplitCounts], Field(min_length=1, max_length=100)]
    files: dict[str, str]
    """SHA-256 by path, of every file but this one and volumes with an array of their own."""

    @property
    def studies(self) -> int:
        return sum(counts.studies for counts in self.counts.values())

    @model_validator(mode="after")
    def _is_what_a_writer_says(self):
        for path in self.files:
            parts = path.split("/")
            if any(p in ("", ".", "..") or p.endswith(".__lock") for p in parts) or not path.isprintable():
                raise ValueError("files: a path leads nowhere in a store")
        parts = -(-self.studies // PART_STUDIES)
        if parts > len(self.files) or any(f"index.parquet/{n:05d}.parquet" not in self.files for n in range(parts)):
            raise ValueError("counts: there are not the tables of so many studies")
        return self


def context(cache_bytes: int = CACHE_BYTES) -> ts.Context:
    """The process's TensorStore context of so large a cache; all stores that are opened with it share the cache."""
    return _context(cache_bytes)


@functools.cache
def _context(cache_bytes: int | None) -> ts.Context:
    """All else (threads, connections, what memory:// URLs hold) is that of one context without a cache."""
    if cache_bytes is None:
        return ts.Context()
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}, parent=_context(None))


def local_folder(url: str) -> Path | None:
    """The folder a path or file:// URL means; None for any other URL."""
    if "://" not in url:
        return Path(url).expanduser().absolute()
    return Path(unquote(urlparse(url).path)) if url.startswith("file://") else None


def open_kvstore(url: str, cache_bytes: int = CACHE_BYTES) -> ts.KvStore:
    """The key-value store at a path or TensorStore URL. Raises UserError for a URL that TensorStore cannot open.

    s3:// asks the server that AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names, as AWS's own tools do, and finds
    credentials where they find them; gs:// has Google's default credentials.
    """
    try:
        return ts.KvStore.open(_kvstore_spec(url), context=context(cache_bytes)).result()
    except ValueError as error:
        raise UserError(f"{url}: not a folder or a URL that TensorStore can open: {error}") from error


def _kvstore_spec(url: str) -> str | dict:
    if folder := local_folder(url):
        return {"driver": "file", "path": f"{folder}/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not (url.startswith("s3://") and endpoint):
        return url.rstrip("/") + "/"
    place = urlparse(url)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    path = unquote(place.path).strip("/")
    return {
        "driver": "s3",
        "bucket": place.netloc,
        "path": f"{path}/" if path else "",
        "endpoint": endpoint.rstrip("/"),
        "aws_region": region,
    }


def read_store_file(kvstore: ts.KvStore, url: str) -> StoreFile | None:
    """`store.json`, or None when there is none; `url` is named in errors.

    Raises UserError when it is of a newer format, corrupt or out of reach.
    """
    data = read_file(kvstore, url, "store.json", JSON_BYTES)
    if data is None:
        return None
    try:
        raw = json.loads(data)
        version = raw["format_version"]
        if isinstance(version, int) and FORMAT_VERSION < version < 10**6:
            raise UserError(
                f"{url}/store.json: has format version {version} and this release reads up to {FORMAT_VERSION}; "
                "upgrade mmfm_jax or build the store again"
            )
        return StoreFile.model_validate(raw)
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{url}/store.json: is not a valid store description; build the store again") from error


def read_file(kvstore: ts.KvStore, url: str, name: str, most: int) -> bytes | None:
    """A file of a store, or None when there is none; `url` is named in errors.

    Raises UserError when it cannot be read, is a pipe or a device, or has more than `most` bytes.
    """
    folder = local_folder(url)
    if folder is not None and (folder / name).exists() and not (folder / name).is_file():
        raise UserError(f"{url}/{name}: is no file; copy the store again or build it again")
    try:
        if _has_more(kvstore, folder, name, most):
            raise UserError(f"{url}/{name}: has more than {most:,} bytes, which no store of ours has; do not trust it")
        found = kvstore.read(name).result()
    except (ValueError, OSError) as error:
        raise UserError(f"{url}: cannot be read: {error}") from error
    return None if found.state == "missing" else found.value


def _has_more(kvstore: ts.KvStore, folder: Path | None, name: str, most: int) -> bool:
    if folder is not None:
        return (folder / name).is_file() and (folder / name).stat().st_size > most
    try:
        return bool(kvstore.read(name, byte_range=slice(most, most + 1)).result().value)
    except ValueError:  # it ends before that, or cannot be read at all, as the whole will say
        return False


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


def check_array(array: ts.TensorStore) -> None:
    """Raises ValueError for an array that the writer would not have made, before a chunk of it is decoded."""
    metadata = array.spec().to_json()["metadata"]
    (outer, *more) = metadata["codecs"]
    inner = [codec["name"] for codec in outer.get("configuration", {}).get("codecs", [])]
    if more or outer["name"] != "sharding_indexed" or inner != [codec["name"] for codec in _CODECS]:
        raise ValueError("its chunks are not coded as ours")
    chunk = prod(outer["configuration"]["chunk_shape"])
    shard = prod(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    if chunk * array.dtype.numpy_dtype.itemsize > MOST_CHUNK_BYTES or shard // chunk > _MOST_IN_SHARD:
        raise ValueError("its chunks are larger than ours")


def array_metadata(spec: ImageSpec, shape: tuple[int, int, int], studies_per_shard: int | None) -> dict:
    """zarr v3 metadata of a stacked array, still of no studies, or (`studies_per_shard` None) of one volume.

    `shape`: voxels z y x.
    """
    stacked = studies_per_shard is not None
    chunk = chunk_shape(shape, max(1, (STACKED_CHUNK_VOXELS if stacked else VOLUME_CHUNK_VOXELS) // spec.channels))
    # A stacked shard holds whole studies; one of a single volume is at most about 256 voxels along an axis.
    per_axis = [ceil(s / c) if stacked else min(ceil(s / c), max(1, 256 // c)) for s, c in zip(shape, chunk)]
    shard = [spec.channels * (studies_per_shard or 1), *(n * c for n, c in zip(per_axis, chunk))]
    names = ["study" if stacked else "channel", "z", "y", "x"]
    return _sharded([0 if stacked else spec.channels, *shape], spec.dtype, shard, [spec.channels, *chunk], names)


def mask_image(spec: MaskSpec, image: ImageSpec) -> ImageSpec:
    """How a mask lies on disk: as an image of its image's shape."""
    return ImageSpec(dtype="uint8", shape=image.shape, description=spec.description)


def positions_per_shard(classes: int) -> int:
    """Studies whose sampled positions share a file."""
    return max(1, SHARD_SAMPLES // classes)


def positions_metadata(classes: int) -> dict:
    """zarr v3 metadata of sampled positions, still of no studies; one class of one study is a chunk."""
    shard = [positions_per_shard(classes) * classes, POSITIONS, 3]
    return _sharded([0, POSITIONS, 3], "int32", shard, [1, POSITIONS, 3], ["class", "position", "axis"])


def intensities_metadata(dtype: str) -> dict:
    """zarr v3 metadata of sampled intensities, still of no studies; one study is a chunk."""
    return _sharded([0, SAMPLED], dtype, [SHARD_SAMPLES, SAMPLED], [1, SAMPLED], ["study", "place"])


def _sharded(shape: list[int], dtype: str, shard: list[int], chunk: list[int], names: list[str]) -> dict:
    return {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "dimension_names": names,
        "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": _CODECS}}],
    }


def group_metadata(
    role: str,
    first_axis: str = "",
    spacing_mm: tuple[float, float, float] | None = None,
    *,
    classes: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
) -> bytes:
    """`zarr.json` of a group: plain, or with an array `0` described to OME-NGFF 0.5 readers if `first_axis` is named.

    `first_axis`: "study" (of no type that NGFF knows) or "channel". `spacing_mm`: of z y x; None when the studies of a
    stacked array differ, and then the scale is in voxels and the spacing of each study is in its row. `classes`: of a
    mask. `labels`: names of masks, for the group that holds them.
    """
    document: dict = {"zarr_format": 3, "node_type": "group"}
    if labels:
        document["attributes"] = {"ome": {"version": "0.5", "labels": list(labels)}}
    if first_axis:
        unit = {"unit": "millimeter"} if spacing_mm else {}
        first = {"name": first_axis, "type": "channel"} if first_axis == "channel" else {"name": first_axis}
        scale = [1.0, *(spacing_mm or (1.0, 1.0, 1.0))]
        multiscale = {
            "name": role,
            "axes": [first, *({"name": axis, "type": "space", **unit} for axis in "zyx")],
            "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}],
        }
        ome: dict = {"version": "0.5", "multiscales": [multiscale]}
        if classes:
            named = [{"label-value": value, "name": name} for value, name in enumerate(classes, 1)]
            ome["image-label"] = {"properties": named, "source": {"image": "../../"}}
        document["attributes"] = {"ome": ome}
    return json.dumps(document, indent=1).encode()
