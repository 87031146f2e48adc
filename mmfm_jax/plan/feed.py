"""Whether hosts and bucket can feed the step of a plan: what reading needs beside what there is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import log2, prod
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mmfm_jax.data.batch import ImageShape, InputSpec
from mmfm_jax.data.study import ImageSpec
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel.sharding import by_study
from mmfm_jax.plan.hosts import DOUBLING_MINUTES, FIRST_REQUESTS, MS_A_DECODED_MB, Supply
from mmfm_jax.plan.lower import VOXELS
from mmfm_jax.plan.reads import Layout, candidates, found, mean_cost, written

ASSUMED_VOLUME = (256, 512, 512)  # without a store: voxels of a CT; an image of one slice is stored as it is used
ASSUMED_RATIO = 1.73  # raw over stored bytes of CT-like volumes by the writer's codec
SAMPLED = 16  # studies of a store whose volumes are looked at; of the first the files are read, for the ratio
PLACE_BYTES = 12_000  # a chunk of sampled places, for a crop that is centred on the foreground
LOADED = 0.7  # of what there is, beyond which nobody should plan to go
SECONDS_A_DAY = 86400.0


@dataclass(frozen=True)
class Role:
    """An image role as it is stored and read."""

    layouts: tuple[Layout, ...]
    """Of the volumes that stand for all."""
    ratio: float
    """Raw over stored bytes."""
    size: tuple[int, int, int]
    """Voxels of a crop as they are read."""
    random: bool
    centred: float
    """Share of the crops for which places of the foreground are read."""


@dataclass(frozen=True)
class Reading:
    """What a study costs to read, in the mean."""

    requests: float
    bytes: float
    """From the bucket."""
    decoded: float
    """Bytes of the chunks once they are decoded."""


@dataclass(frozen=True)
class Need:
    """One resource: what the run needs at full speed and what there is, in the same unit."""

    name: str
    need: float
    have: float | None
    """None where there is no known end."""
    unit: str

    @property
    def load(self) -> float:
        return self.need / self.have if self.have else 0.0


@dataclass(frozen=True)
class Feed:
    """Of a run that takes a step in `step_seconds` whenever its data is there."""

    step_seconds: float
    hosts: int
    studies: float
    """A second and host, of the host that reads most."""
    again: float
    """Times that a study is read for one step, by all hosts together: above 1 where hosts share studies."""
    reading: Reading
    needs: tuple[Need, ...]
    requests: float
    """A second, of all hosts."""
    request_usd: float
    """A day."""
    core_ms: float
    """Of a study."""
    chunks: dict[str, tuple[int, int, int]]
    """By role."""

    @property
    def slowest(self) -> Need | None:
        """What holds the chips up; None where they are what bounds the run."""
        worst = max(self.needs, key=lambda need: need.load)
        return worst if worst.load > 1 else None

    @property
    def bound(self) -> str:
        return self.slowest.name if self.slowest else "chip"

    @property
    def slowdown(self) -> float:
        return self.slowest.load if self.slowest else 1.0

    @property
    def ramp_hours(self) -> float:
        """Until a bucket that doubles what it takes every 20 minutes takes all requests."""
        return max(log2(max(self.requests / FIRST_REQUESTS, 1)) * DOUBLING_MINUTES / 60, 0.0)


def stored_roles(experiment: Experiment, spec: InputSpec, voxels: dict[str, str] | None, store: Any = None) -> dict:
    """By name, how each image role lies: as in `store`, or as the writer would lay out assumed volumes."""
    roles = {}
    for name, image in spec.images.items():
        given = experiment.inputs.images[name]
        where = _sampled(store, name, image) if store is not None else _assumed(image, (voxels or {}).get(name, VOXELS))
        centred = given.foreground.share if given.foreground else 0.0
        roles[name] = Role(*where, size=image.raw, random=given.crop == "random", centred=centred)
    return roles


def _assumed(image: ImageShape, dtype: str) -> tuple[tuple[Layout, ...], float]:
    flat = image.raw[0] == 1
    z, y, x = (max(a, b) for a, b in zip(ASSUMED_VOLUME, image.raw))
    shape = image.raw if flat else (z, y, x)
    spec = ImageSpec(dtype=dtype, shape=shape if flat else None, channels=image.raw_channels)
    return (written(spec, shape),), ASSUMED_RATIO


def _sampled(store: Any, name: str, image: ImageShape) -> tuple[tuple[Layout, ...], float]:
    """Layouts of some training volumes of a store, and how far the files of the first are smaller than its voxels."""
    rows = [int(row) for row in store.rows("train")[: 16 * SAMPLED]]
    held = {row: info for row in rows if (info := store.volume_info(name, row))}
    if not held:
        return _assumed(image, store.schema.images[name].dtype)
    arrays = {row: store.inside(name, row, (0, 0, 0), held[row][0]) for row in list(held)[:SAMPLED]}
    spec = store.schema.images[name]
    return tuple(found(array, held[row][0], spec) for row, array in arrays.items()), _ratio(next(iter(arrays.values())))


def _ratio(array: Any) -> float:
    """Raw over stored bytes of at most four shards."""
    files = array.kvstore
    keys = [key for key in sorted(files.list().result()) if key.startswith(b"c/")][:4]
    shard, domain = array.chunk_layout.write_chunk.shape, array.spec().to_json()["metadata"]["shape"]
    raw = stored = 0
    for key in keys:
        places = [int(n) for n in key.decode().split("/")[1:]]
        raw += prod(min(s, extent - n * s) for n, s, extent in zip(places, shard, domain))
        stored += len(files.read(key).result().value)
    return raw * array.dtype.numpy_dtype.itemsize / stored if stored else ASSUMED_RATIO


def reading(experiment: Experiment, roles: dict[str, Role]) -> Reading:
    """Of a study that has every part; its row is one request of as many bytes as its tokens and columns."""
    inputs = experiment.inputs
    rows = 4 * (sum(text.length * text.readings for text in inputs.texts.values()) + len(inputs.columns))
    total = Reading(1.0, float(rows), 0.0)
    for role in roles.values():
        of = mean_cost(role.layouts, role.size, role.random)
        stored = of.voxels * role.layouts[0].voxel_bytes / role.ratio
        total = Reading(
            total.requests + of.requests + 2 * role.centred,
            total.bytes + stored + of.index_bytes + PLACE_BYTES * role.centred,
            total.decoded + of.chunks * float(np.mean([layout.chunk_bytes for layout in role.layouts])),
        )
    return total


def rows_by_host(batch_size: int, mesh: Mesh) -> list[int]:
    """Studies of a step that each host reads: those that its devices hold, once each."""
    held = defaultdict(set)
    for device, (index,) in by_study(mesh).devices_indices_map((batch_size,)).items():
        held[device.process_index].add(index.indices(batch_size)[:2])
    return [sum(stop - start for start, stop in of) for of in held.values()]


def feed(
    experiment: Experiment,
    roles: dict[str, Role],
    mesh: Mesh,
    step_seconds: float,
    supply: Supply,
    crossing: float = 0.0,
    decoded_of_given: float | None = None,
) -> Feed:
    """`crossing`: bytes that a host receives from other slices in a step. `decoded_of_given`: decoded bytes of a study
    that `supply.crop_ms` is of; by default those of `roles`."""
    size, of = experiment.train.batch_size, reading(experiment, roles)
    rows = rows_by_host(size, mesh)
    most, again = max(rows), sum(rows) / size
    studies, all_studies = most / step_seconds, sum(rows) / step_seconds
    core_ms = MS_A_DECODED_MB * of.decoded / 1e6
    if supply.crop_ms is not None and of.decoded:
        core_ms = len(roles) * supply.crop_ms * of.decoded / (decoded_of_given or of.decoded)
    requests = all_studies * of.requests
    raw = sum(prod(role.size) * role.layouts[0].voxel_bytes for role in roles.values())
    ahead = experiment.data.prefetch_batches
    memory = 2 * (experiment.data.cache_bytes + (ahead + 3) * most * raw + ahead * most * of.decoded) + 2**28
    needs = (
        Need("bucket", all_studies * of.bytes, supply.bucket, "B/s"),
        Need("requests", requests, supply.requests, "/s"),
        Need("network", studies * of.bytes + crossing / step_seconds, supply.network, "B/s"),
        Need("host cores", studies * core_ms / 1e3, supply.cores, "cores"),
        Need("host memory", memory, supply.memory, "B"),
    )
    return Feed(
        step_seconds=step_seconds,
        hosts=len(rows),
        studies=studies,
        again=again,
        reading=of,
        needs=needs,
        requests=requests,
        request_usd=requests * SECONDS_A_DAY / 1e3 * supply.request_price,
        core_ms=core_ms,
        chunks={name: role.layouts[0].chunk for name, role in roles.items()},
    )


def with_other_chunks(
    experiment: Experiment, roles: dict[str, Role], mesh: Mesh, step_seconds: float, supply: Supply, crossing: float = 0
) -> dict[str, Feed]:
    """The same run had its volumes been written in other chunks; images of one slice stay as they are."""
    volumes = [name for name, role in roles.items() if all(layout.shape[0] > 1 for layout in role.layouts)]
    if not volumes:
        return {}
    now = reading(experiment, roles).decoded
    others: dict[str, Feed] = {}
    for named in candidates(roles[volumes[0]].layouts[0]):
        changed = {
            name: replace(
                role, layouts=tuple(candidates(layout)[named] for layout in role.layouts)
            ) if name in volumes else role
            for name, role in roles.items()
        }  # fmt: skip
        others[named] = feed(experiment, changed, mesh, step_seconds, supply, crossing, now)
    return others


def best_chunks(others: dict[str, Feed]) -> str | None:
    """Those that hold the run up least; of those that load nothing beyond 70%, those with the fewest requests, unless
    a tenth more of them spares bytes."""

    def load(name: str) -> float:
        return round(max(LOADED, *(need.load for need in others[name].needs)), 2)

    least = min(map(load, others), default=LOADED)
    best = None
    for name in sorted((n for n in others if load(n) == least), key=lambda n: others[n].reading.bytes):
        if best is None or others[name].requests < 0.9 * others[best].requests:
            best = name
    return best
