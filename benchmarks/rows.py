"""What the rows of a store cost: start-up, random studies a second, memory; of `mmfm sample idc`, a million rows.

`make rows`. The same Parquet tables are then read as a store of version 2, a row group for a study, so that both are
measured in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mmfm_jax.data.store.study_store import StudyStore, Wanted

ROWS = 20_000
FEW = Wanted(frozenset({"series"}), frozenset({"age_years", "size_mb", "manufacturer"}), frozenset({"modality"}))


def measure(url: str, rows: int, share: float, few: bool) -> dict[str, float]:
    """Of a process that opens a store, asks for its training rows, and then for some at random."""
    before = resident_mb()
    started = time.perf_counter()
    store = StudyStore.open(url, share)
    train = store.rows("train")
    opened = time.perf_counter() - started
    drawn = np.random.default_rng(0).choice(train, rows)
    store.table(int(drawn[0]), FEW if few else None)
    started, cpu = time.perf_counter(), time.process_time()
    for row in drawn.tolist():
        store.table(row, FEW if few else None)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "start-up s": opened,
        "rows a second": rows / wall,
        "ms of a core a row": 1e3 * cpu / rows,
        "memory MB": resident_mb() - before,
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def older(url: str) -> str:
    """The store as version 2 had it, of links to the same files."""
    folder = Path(url).with_name(f"{Path(url).name}-version-2")
    if not folder.exists():
        for table in ("studies.parquet", "index.parquet"):
            (folder / table).mkdir(parents=True)
            for part in sorted((Path(url) / table).iterdir()):
                os.link(part, folder / table / part.name)
        os.link(Path(url) / "stats.json", folder / "stats.json")
        file = json.loads((Path(url) / "store.json").read_text())
        (folder / "store.json").write_text(json.dumps(file | {"format_version": 2}))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--child", help="what to measure, as JSON; each in a process of its own")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.store, **json.loads(args.child))))
        return
    if not Path(args.store).exists():
        started = time.perf_counter()
        subprocess.run(["mmfm", "sample", "idc", "--out", args.store], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"built in {time.perf_counter() - started:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of a core, "
              f"{used.ru_maxrss / 1e3:.0f} MB at most")  # fmt: skip
    for table in ("studies.parquet", "index.parquet", "rows"):
        held = sum(part.stat().st_size for part in (Path(args.store) / table).iterdir())
        print(f"{table}: {held / 1e6:.0f} MB")
    for name, url, rows in (("format 3", args.store, ROWS), ("format 2", older(args.store), ROWS // 20)):
        for share in (1.0, 0.5):
            for few in (False, True):
                how = json.dumps({"rows": rows, "share": share, "few": few})
                run = [sys.executable, __file__, args.store if name == "format 3" else url, "--child", how]
                found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
                said = ", ".join(f"{what} {value:.3g}" for what, value in found.items())
                print(f"{name}, train_share {share}, {'5 fields' if few else 'all fields'}: {said}")


if __name__ == "__main__":
    main()
