"""Resident memory over 2,000 batches of a store larger than the cache, against a stated bound. Run by `make memory`.

The store is synthetic, 24 volumes of 512 x 512 x 256 int16 (3 GiB), written to a temporary folder by another process,
so that nothing which the writer left is counted as there before. Exit status 1 says that the bound was passed.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

from rich.table import Table

from mmfm_jax.bench.data import Reading, builtin
from mmfm_jax.bench.volumes import SCHEMA, ct_studies
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.screen import make_console

VOLUMES, SLICES = 24, 256
BESIDES = 256 * 2**20
"""Rows, footers, stacks of threads and code that is loaded late."""


def resident() -> int:
    """Bytes of this process in memory."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def bound(reading: Reading, cache_bytes: int) -> int:
    """Bytes beyond what the process has before it reads.

    Twice what is held, for glibc keeps as much again between blocks: the cache, the batches (`prefetch_batches`, one
    put together, one handed out, one begun) and the chunks of the crops whose reading is under way.
    """
    batch = sum(part.voxels.nbytes for part in reading.samples.room(reading.size, {}).images.values())
    chunks = 0
    for role, shape in reading.samples.spec.images.items():
        first = reading.store.inside(role, int(reading.store.rows("train")[0]), (0, 0, 0), shape.size)
        chunk = cast(tuple[int, ...], first.chunk_layout.read_chunk.shape)[1:]
        touched = math.prod((1 + math.ceil((s - 1) / c)) * c for s, c in zip(shape.size, chunk))
        chunks += reading.ahead * reading.size * touched * shape.raw_channels * first.dtype.numpy_dtype.itemsize
    return 2 * (cache_bytes + (reading.ahead + 3) * batch + chunks) + BESIDES


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batches", type=int, default=2000)
    options.add_argument("--write", help="write the store there and end")
    args = options.parse_args()
    if args.write:
        write_store(args.write, SCHEMA, ct_studies([SLICES] * VOLUMES, ["train"] * VOLUMES))
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write", f"{folder}/store"], check=True)
        experiment = builtin(f"{folder}/store")
        reading = Reading(experiment)
        before, cache = resident(), experiment.data.cache_bytes
        allowed = bound(reading, cache)
        table = Table("batches", "resident beyond the start, MiB", "seconds")
        started, most = time.perf_counter(), 0
        for number, _ in enumerate(reading.batches(0, args.batches)):
            most = max(most, resident() - before)
            if number and number % (args.batches // 10) == 0:
                seconds = time.perf_counter() - started
                table.add_row(f"{number}", f"{(resident() - before) / 2**20:.0f}", f"{seconds:.0f}")
    make_console().print(table)
    store, cache, most, bound_ = (n / 2**20 for n in (VOLUMES * SLICES * 512 * 512 * 2, cache, most, allowed))
    print(
        f"Voxels {store:.0f} MiB, cache {cache:.0f} MiB; resident at most {most:.0f} MiB more, bound {bound_:.0f} MiB."
    )
    sys.exit(most > bound_)


if __name__ == "__main__":
    main()
