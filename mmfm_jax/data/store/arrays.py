"""The arrays of a store being written: voxels and masks by role, and samples of them, each file with its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from mmfm_jax.data.store.format import (
    array_metadata,
    array_spec,
    context,
    group_metadata,
    mask_image,
    stacked_studies_per_shard,
)
from mmfm_jax.data.study import Image, ImageSpec, MaskSpec


class Stack:
    """An array that grows along its first axis, entries of all studies one after another, a shard at a time."""

    def __init__(self, kvstore: ts.KvStore, path: str, metadata: dict, per_shard: int, files: dict[str, str]):
        self._kvstore, self._path, self._files = kvstore, path, files
        self._array = _create(kvstore, path, metadata)
        self._buffer = np.zeros((per_shard, *metadata["shape"][1:]), metadata["data_type"])
        self._filled, self._shards = 0, 0

    def add(self, entries: np.ndarray | int, count: int) -> None:
        """Adds `count` entries along the first axis: an array, or a number for all of them."""
        self._buffer[self._filled : self._filled + count] = entries
        self._filled += count
        if self._filled == len(self._buffer):
            self._flush()

    def finish(self) -> None:
        if self._filled:
            self._flush()
        checksum(self._kvstore, f"{self._path}/zarr.json", self._files)

    def _flush(self) -> None:
        start = self._array.shape[0]
        stop = start + self._filled
        self._array = self._array.resize(exclusive_max=[stop, *self._buffer.shape[1:]], expand_only=True).result()
        self._array[start:stop].write(self._buffer[: self._filled]).result()
        zeros = "/0" * (self._buffer.ndim - 1)
        checksum(self._kvstore, f"{self._path}/c/{self._shards}{zeros}", self._files)
        self._filled, self._shards = 0, self._shards + 1


class StackedRole:
    """All volumes of a role in one array [study * channel, z, y, x], its masks in one each [study, z, y, x].

    A study without one holds zeros there.
    """

    def __init__(
        self, kvstore: ts.KvStore, role: str, spec: ImageSpec, masks: dict[str, MaskSpec], files: dict[str, str]
    ):
        self._kvstore, self._role, self._files, self._masks = kvstore, role, files, masks
        self._spacings: set[tuple[float, float, float]] = set()
        self._image = self._stack(f"volumes/{role}/0", spec)
        self._stacks = {
            name: self._stack(f"volumes/{role}/labels/{name}/0", mask_image(mask, spec)) for name, mask in masks.items()
        }
        self._channels = spec.channels

    def _stack(self, path: str, spec: ImageSpec) -> Stack:
        assert spec.shape is not None
        per_shard = stacked_studies_per_shard(spec, np.dtype(spec.dtype).itemsize)
        metadata = array_metadata(spec, spec.shape, per_shard)
        return Stack(self._kvstore, path, metadata, per_shard * spec.channels, self._files)

    def add(self, row: int, image: Image | None, masks: Mapping[str, np.ndarray]) -> None:
        del row  # studies come in the order of their rows
        self._image.add(0 if image is None else np.moveaxis(image.voxels, -1, 0), self._channels)
        for name, stack in self._stacks.items():
            stack.add(masks.get(name, 0), 1)
        if image is not None and len(self._spacings) < 2:
            self._spacings.add(image.spacing_mm)

    def finish(self) -> None:
        for stack in (self._image, *self._stacks.values()):
            stack.finish()
        spacing = self._spacings.pop() if len(self._spacings) == 1 else None
        path = f"volumes/{self._role}"
        for key, metadata in _groups(path, self._role, "study", spacing, self._masks, list(self._masks)).items():
            put(self._kvstore, key, metadata, self._files)


class VolumeRole:
    """One array [channel, z, y, x] for each volume of a role, in a group of its own, and its masks in that group."""

    def __init__(
        self, kvstore: ts.KvStore, role: str, spec: ImageSpec, masks: dict[str, MaskSpec], files: dict[str, str]
    ):
        self._kvstore, self._role, self._spec, self._masks = kvstore, role, spec, masks
        put(kvstore, f"volumes/{role}/zarr.json", group_metadata(role), files)

    def add(self, row: int, image: Image | None, masks: Mapping[str, np.ndarray]) -> str | None:
        """Writes a volume with its masks and returns the checksum of its files."""
        if image is None:
            return None
        path = f"volumes/{self._role}/{row:08d}"
        self._write(f"{path}/0", self._spec, np.moveaxis(image.voxels, -1, 0))
        held = [name for name in self._masks if name in masks]
        for name in held:
            self._write(f"{path}/labels/{name}/0", mask_image(self._masks[name], self._spec), masks[name][None])
        for key, metadata in _groups(path, self._role, "channel", image.spacing_mm, self._masks, held).items():
            self._kvstore.write(key, metadata).result()
        return checksum_under(self._kvstore, path)

    def _write(self, path: str, spec: ImageSpec, voxels: np.ndarray) -> None:
        z, y, x = voxels.shape[1:]
        array = _create(self._kvstore, path, array_metadata(spec, (z, y, x), None))
        array.write(np.ascontiguousarray(voxels)).result()

    def finish(self) -> None:
        """Every volume is already written."""


def _groups(
    path: str,
    role: str,
    first_axis: str,
    spacing_mm: tuple[float, float, float] | None,
    masks: Mapping[str, MaskSpec],
    held: list[str],
) -> dict[str, bytes]:
    """By path, the metadata of an image's group, and of the groups of those of its masks that it holds."""
    groups = {f"{path}/zarr.json": group_metadata(role, first_axis, spacing_mm)}
    if held:
        groups[f"{path}/labels/zarr.json"] = group_metadata("labels", labels=tuple(held))
    for name in held:
        metadata = group_metadata(name, first_axis, spacing_mm, classes=masks[name].classes)
        groups[f"{path}/labels/{name}/zarr.json"] = metadata
    return groups


def checksum_under(kvstore: ts.KvStore, path: str) -> str:
    """SHA-256 over the sorted names and contents of the files below `path`."""
    digest = hashlib.sha256()
    for key in sorted(kvstore.list(keys_under(f"{path}/")).result()):
        digest.update(key.removeprefix(path.encode()) + b"\0")
        digest.update(hashlib.sha256(kvstore.read(key).result().value).digest())
    return digest.hexdigest()


def _create(kvstore: ts.KvStore, path: str, metadata: dict) -> ts.TensorStore:
    return ts.open({**array_spec(kvstore, path), "metadata": metadata}, create=True, context=context()).result()


def keys_under(prefix: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def put(kvstore: ts.KvStore, key: str, value: bytes, files: dict[str, str]) -> None:
    kvstore.write(key, value).result()
    files[key] = hashlib.sha256(value).hexdigest()


def checksum(kvstore: ts.KvStore, key: str, files: dict[str, str]) -> None:
    """Hashes what TensorStore wrote by reading it back."""
    files[key] = hashlib.sha256(kvstore.read(key).result().value).hexdigest()
