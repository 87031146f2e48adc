"""What reading a crop is said to cost, against the requests that TensorStore really sends."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from mmfm_jax.data.store.format import array_metadata
from mmfm_jax.data.study import ImageSpec
from mmfm_jax.plan.reads import Layout, candidates, cost, mean_cost, with_chunk, written

CT = ImageSpec(dtype="int16", shape=None)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder served over HTTP with ranges, and what was asked of it: (path, range, bytes given)."""
    root, asked = tmp_path_factory.mktemp("bucket"), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args):
            """Says nothing."""

        def do_GET(self):
            path = root / self.path.lstrip("/")
            content = path.read_bytes() if path.is_file() else b""
            wanted: Any = self.headers.get("Range")
            low, high = 0, len(content)
            if wanted and path.is_file():
                first, last = re.findall(r"bytes=(\d*)-(\d*)", wanted)[0]
                low = int(first) if first else len(content) - int(last)
                high = int(last) + 1 if first and last else len(content)
            asked.append((self.path, wanted, high - low))
            self.send_response(404 if not path.is_file() else 206 if wanted else 200)
            self.send_header("Content-Length", str(high - low))
            self.send_header("Content-Range", f"bytes {low}-{high - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[low:high])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def write(place, metadata: Any, rng):
    """Noise that does not compress, so no gap between two chunks is small enough to be read over."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{place}/"}, "metadata": metadata}
    array = ts.open(spec, create=True).result()
    array[...].write(rng.integers(-30000, 30000, metadata["shape"], np.int16)).result()


def opened(url, name):
    return ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "http", "base_url": url, "path": f"/{name}/"}},
        open=True, read=True, context=ts.Context({"cache_pool": {"total_bytes_limit": 0}}),
        recheck_cached_data=False, recheck_cached_metadata=False,
    ).result()  # fmt: skip


def test_requests_and_chunks_of_a_crop_are_those_that_tensorstore_asks_for(bucket):
    root, url, asked = bucket
    rng = np.random.default_rng()
    for number in range(6):
        chunk: Any = tuple(int(n) for n in rng.choice([16, 24, 32], 3))
        # Whole chunks: a cut one compresses so far that TensorStore may read over it to the next.
        shape: Any = tuple(c * int(rng.integers(1, 7)) for c in chunk)
        layout = with_chunk(Layout(shape, shape, shape, None, 2), chunk)
        per_shard = [int(rng.integers(1, 4)) for _ in range(3)]  # small shards, so that crops cross them
        shard: Any = tuple(c * n for c, n in zip(layout.chunk, per_shard))
        layout = Layout(shape, layout.chunk, shard, None, 2)
        metadata: Any = array_metadata(CT, shape, None)
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [1, *shard]
        metadata["codecs"][0]["configuration"]["chunk_shape"] = [1, *layout.chunk]
        write(root / f"{number}", metadata, rng)
        for _ in range(5):
            size: Any = tuple(int(rng.integers(1, s + 1)) for s in shape)
            start = [int(rng.integers(s)) for s in shape]  # it may end with the volume
            asked.clear()
            box = tuple(slice(a, min(a + n, s)) for a, n, s in zip(start, size, shape))
            opened(url, number)[(0, *box)].read().result()
            found = cost(layout, start, size)
            assert len(asked) == found.requests, (layout, start, size)
            read = sum(given for path, _, given in asked if "/c/" in path)
            assert read == pytest.approx(found.index_bytes + found.chunks * layout.chunk_bytes, rel=0.02)
            assert found.voxels == found.chunks * layout.chunk_bytes // 2


def test_a_stacked_volume_costs_no_metadata_and_one_request_for_neighbours(bucket):
    """A slice of 512 x 512 is one chunk, in a shard of 128 studies."""
    layout = written(ImageSpec(dtype="int16", shape=(1, 512, 512)), (1, 512, 512))
    assert (layout.chunk, layout.studies) == ((1, 512, 512), 128)
    found = cost(layout, (0, 0, 0), (1, 512, 512))
    assert (found.requests, found.chunks, found.voxels, found.index_bytes) == (2, 1, 512**2, 128 * 16 + 4)


@pytest.mark.parametrize("chunk, said", [(32, 22), (64, 8)])
def test_a_ct_crop_costs_about_22_requests_in_small_chunks_and_8_in_large(chunk, said):
    """96^3 of 256 x 512 x 512: metadata, a run for each row of chunks along x in a shard of 256^3, indices."""
    layout = candidates(written(CT, (256, 512, 512)))[f"{chunk}^3"]
    assert (layout.chunk, layout.shard) == ((chunk,) * 3, (256, 256, 256))
    starts = {extent: np.arange(extent - 96 + 1) for extent in (256, 512)}
    chunks = {extent: np.mean((of + 95) // chunk - of // chunk + 1) for extent, of in starts.items()}
    crossing = np.mean((starts[512] + 95) // 256 - starts[512] // 256 + 1)
    found = mean_cost([layout], (96, 96, 96))
    assert found.requests == pytest.approx(1 + chunks[256] * chunks[512] * crossing + crossing**2, rel=0.05)
    assert found.requests == pytest.approx(said, abs=2.5)  # as counted once at an emulated bucket
    assert found.chunks == pytest.approx(chunks[256] * chunks[512] ** 2, rel=0.05)


def test_what_chunks_hold_beyond_the_volume_is_decoded_and_not_stored():
    layout = with_chunk(Layout((40, 100, 100), (40, 100, 100), (40, 100, 100), None, 2), (32, 32, 32))
    found = cost(layout, (0, 0, 0), (40, 100, 100))
    assert (found.chunks, found.voxels) == (2 * 4 * 4, 40 * 100 * 100)


def test_slabs_of_whole_slices_are_one_run():
    slabs = candidates(written(CT, (256, 512, 512)))["whole slices"]
    found = cost(slabs, (3, 100, 100), (96, 96, 96))
    assert (found.requests, found.chunks) == (1 + 1 + 1, 13)
