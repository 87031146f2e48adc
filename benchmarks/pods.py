"""Plans every configuration for the pod that it is for and keeps what was found in configs/pods.json.

Run by `make pods`, five to fifteen minutes each on 2 cores. `--only NAME` plans those alone whose path has that word.
Exit status 1 says that one does not fit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml
from rich.table import Table

from mmfm_jax.plan.chips import GIB
from mmfm_jax.plan.kept import KEPT, Pair, digest
from mmfm_jax.screen import make_console


def planned(pair: Pair) -> dict:
    """What `mmfm plan` says of it; its progress goes to stderr."""
    command = [sys.executable, "-m", "mmfm_jax.cli", "plan", pair.config, "--topology", pair.topology, "--json"]
    done = subprocess.run([*command, "--slices", str(pair.slices)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    return {
        "fits": found["fits"],
        "hbm_gib": round(found["hbm_bytes"] / GIB, 2),
        "hbm_limit_gib": round(found["hbm_limit_bytes"] / GIB, 2),
        "step_seconds": found["step_seconds"] and round(found["step_seconds"], 4),
        "mfu": found["mfu"] and round(found["mfu"], 4),
        "libtpu": version("libtpu"),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", metavar="NAME")
    only = options.parse_args().only
    rows = json.loads(Path(KEPT).read_text())
    for row in rows:
        pair = Pair(row["config"], row["topology"], row["slices"])
        if only in pair.config:
            print(f"{pair.config} on {pair.topology}", file=sys.stderr)
            row |= {"digest": digest(yaml.safe_load(Path(pair.config).read_text()), pair.devices)} | planned(pair)
            Path(KEPT).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("configuration", "pod", "HBM a chip", "step", "MFU", "planned")
    for row in rows:
        where = row["topology"] + (f" x {row['slices']}" if row["slices"] > 1 else "")
        step = f"{row['step_seconds']:.3g} s" if row["fits"] else "does not fit"
        mfu = f"{100 * row['mfu']:.1f}%" if row["fits"] else ""
        table.add_row(row["config"], where, f"{row['hbm_gib']} of {row['hbm_limit_gib']} GiB", step, mfu, row["date"])
    make_console().print(table)
    sys.exit(0 if all(row["fits"] for row in rows) else 1)


if __name__ == "__main__":
    main()
