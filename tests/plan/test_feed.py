"""Need and supply of a run's reading, by numbers that can be worked out by hand."""

import io
from dataclasses import dataclass, replace
from typing import Any

import pytest
from rich.console import Console

from mmfm_jax.bench.data import builtin
from mmfm_jax.bench.volumes import SCHEMA, ct_studies
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.experiment import validate
from mmfm_jax.plan import feed, feed_report
from mmfm_jax.plan.chips import CHIPS
from mmfm_jax.plan.hosts import supply
from mmfm_jax.plan.lower import assumed_spec
from mmfm_jax.plan.reads import Layout

HAVE = supply(CHIPS["v5e"], 4)
NO_MESH: Any = None  # hosts are given


def experiment(**image):
    tower = {"width": 8, "depth": 1, "heads": 1}
    given = {"size": [64, 128, 128], "patch": [8, 8, 8], "window": [0, 1], "crop": "random", **image}
    raw = {
        "name": "fed",
        "inputs": {"images": {"ct": given}, "texts": {"report": {"length": 100}}},
        "data": {"store": "none", "vocabulary_size": 512, "prefetch_batches": 2, "cache_bytes": 1000},
        "model": {"vision": tower, "text": tower, "table": tower, "fusion": {**tower, "latents": 1}},
        "tasks": {"masked": {"kind": "masked", "depth": 1}},
        "train": {"steps": 1, "batch_size": 64},
    }
    return validate(raw, "the test")


def role(shape, chunk, shard, size, **changed):
    made = feed.Role((Layout(shape, chunk, shard, None, 2),), ratio=2.0, size=size, random=True, centred=0.0)
    return replace(made, **changed)


@dataclass(frozen=True)
class Placed:
    """A device as far as rows by host ask."""

    id: int
    process_index: int


def hosts(count: int, rows: int, monkeypatch, fewer: int = 0):
    """`count` hosts that each read `rows` of the studies, the last `fewer` less."""
    monkeypatch.setattr(feed, "rows_by_host", lambda size, mesh: [rows] * (count - 1) + [rows - fewer])


def test_a_run_that_reads_whole_volumes_needs_what_is_counted_by_hand(monkeypatch):
    """64 x 128 x 128 int16 in one shard of 2 chunks, 64 studies a step of half a second, 16 hosts."""
    hosts(16, 4, monkeypatch)
    whole = role((64, 128, 128), (32, 128, 128), (64, 128, 128), (64, 128, 128))
    found = feed.feed(experiment(), {"ct": whole}, NO_MESH, 0.5, HAVE, crossing=1e9)
    hosts(16, 4, monkeypatch, fewer=2)
    assert feed.feed(experiment(), {"ct": whole}, NO_MESH, 0.5, HAVE).studies == found.studies == 8
    volume, index = 64 * 128 * 128 * 2, 2 * 16 + 4
    of = found.reading
    assert of.requests == 1 + 1 + 1  # row, metadata, and the shard in one piece
    assert of.bytes == 400 + volume / 2 + index and of.decoded == volume
    need = {need.name: need.need for need in found.needs}
    assert need["bucket"] == pytest.approx(128 * of.bytes)
    assert need["network"] == pytest.approx(8 * of.bytes + 2e9)
    assert need["requests"] == found.requests == 128 * 3
    assert found.request_usd == pytest.approx(128 * 3 * 86400 / 1000 * 0.0004)
    assert need["host cores"] == pytest.approx(8 * 1.5e-3 * volume / 1e6)
    assert need["host memory"] == 2 * (1000 + 5 * 4 * volume + 2 * 4 * volume) + 2**28
    assert found.bound == "chip" and found.slowdown == 1 and found.ramp_hours == 0


def test_the_resource_that_lacks_most_bounds_the_run(monkeypatch):
    hosts(16, 4, monkeypatch)
    whole = {"ct": role((64, 128, 128), (32, 128, 128), (64, 128, 128), (64, 128, 128))}
    for flag, least, named in (
        ("cores", {"cores": 0.0001}, "host cores"),
        ("gbps", {"gbps": 1e-4}, "network"),
        ("bucket", {"bucket_gbps": 1e-3}, "bucket"),
        ("memory", {"memory_gb": 0.1}, "host memory"),
        ("requests", {"requests": 192}, "requests"),
    ):
        found = feed.feed(experiment(), whole, NO_MESH, 0.5, supply(CHIPS["v5e"], 4, **least))
        assert found.bound == named and found.slowdown > 1, flag
    assert found.slowdown == 2  # 384 requests of 192


def test_a_host_reads_what_its_devices_hold_and_hosts_of_one_sequence_read_it_again():
    devices = [Placed(n, n // 4) for n in range(16)]

    class Sharded:
        def __init__(self, of):
            self._of = of

        def devices_indices_map(self, shape):
            return self._of(shape[0])

    def rows(of, size=16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feed, "by_study", lambda mesh: Sharded(of))
            return feed.rows_by_host(size, NO_MESH)

    assert rows(lambda size: {d: (slice(d.id, d.id + 1),) for d in devices}) == [4, 4, 4, 4]
    shared = rows(lambda size: {d: (slice(8 * (d.id // 8), 8 * (d.id // 8) + 8),) for d in devices})
    assert shared == [8, 8, 8, 8]  # two hosts hold the same eight


def test_measured_milliseconds_are_of_the_chunks_that_are_there(monkeypatch):
    hosts(1, 64, monkeypatch)
    roles = {"ct": role((256, 512, 512), (32, 32, 32), (256, 256, 256), (96, 96, 96))}
    have = supply(CHIPS["v5e"], 4, crop_ms=7.0)
    assert feed.feed(experiment(), roles, NO_MESH, 1.0, have).core_ms == 7
    others = feed.with_other_chunks(experiment(), roles, NO_MESH, 1.0, have)
    now, large = others["32^3"], others["64^3"]
    assert now.core_ms == pytest.approx(7) and large.core_ms == pytest.approx(
        7 * large.reading.decoded / now.reading.decoded
    )
    assert large.reading.requests < 0.6 * now.reading.requests and large.reading.bytes > now.reading.bytes


def test_best_chunks_hold_the_run_up_least_and_then_ask_least(monkeypatch):
    hosts(64, 64, monkeypatch)
    roles = {"ct": role((256, 512, 512), (32, 32, 32), (256, 256, 256), (96, 192, 192))}
    known = (experiment(), roles, NO_MESH, 1.0)
    wide = feed.with_other_chunks(*known, supply(CHIPS["v5e"], 4, bucket_gbps=1e6, cores=1e6, gbps=1e6))
    assert feed.best_chunks(wide) == "whole slices" == min(wide, key=lambda name: wide[name].requests)
    narrow = feed.with_other_chunks(*known, supply(CHIPS["v5e"], 4, bucket_gbps=10))
    assert feed.best_chunks(narrow) == "32^3" == min(narrow, key=lambda name: narrow[name].reading.bytes)


def test_without_a_store_volumes_are_assumed_and_with_one_looked_at(tmp_path):
    write_store(str(tmp_path / "store"), SCHEMA, ct_studies([40, 40], ["train", "train"]))
    config = builtin(str(tmp_path / "store"))
    assumed = feed.stored_roles(config, assumed_spec(config), None)["image"]
    assert assumed.layouts[0].shape == (256, 512, 512) and assumed.ratio == 1.73 and assumed.random
    seen = feed.stored_roles(config, assumed_spec(config), None, open_data(config.data))["image"]
    assert [layout.shape for layout in seen.layouts] == [(40, 512, 512)] * 2
    assert seen.layouts[0].chunk == (20, 32, 32) and seen.layouts[0].shard == (40, 256, 256)
    files = [file for file in (tmp_path / "store/volumes/image/00000000/0/c").rglob("*") if file.is_file()]
    assert seen.ratio == pytest.approx(40 * 512 * 512 * 2 / sum(file.stat().st_size for file in files))


def test_the_report_says_what_bounds_and_which_chunks_are_better(monkeypatch):
    hosts(64, 64, monkeypatch)
    roles = {"ct": role((256, 512, 512), (32, 32, 32), (256, 256, 256), (96, 192, 192))}
    known = (experiment(), roles, NO_MESH, 1.0, supply(CHIPS["v5e"], 4, bucket_gbps=10))
    found, others = feed.feed(*known), feed.with_other_chunks(*known)
    printed = io.StringIO()
    Console(width=160, file=printed).print(feed_report.report(found, others, True))
    said = printed.getvalue()
    assert "bucket, all hosts together bounds the run: a step would take" in said and "Best: 32^3." in said
    data = feed_report.as_json(found, others, True)
    assert data["bound"] == "bucket" and data["slowdown"] == pytest.approx(found.slowdown)
    assert data["best_chunks"] == "32^3" and data["needs"]["requests"]["have"] is None
