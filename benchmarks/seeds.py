"""Whether the demo's result holds: three seeds on one split of the patients, and one seed on another split.

Run by `make seeds`, about ten minutes a run on 2 cores. A run that is finished is not trained again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONFIG = "configs/demo.yaml"
RUNS = Path("runs/seeds")
SPLIT_KEYS = {"mmfm": "data/lidc", "another": "data/lidc-another"}  # and the store of each
CASES = (("mmfm", 0), ("mmfm", 1), ("mmfm", 2), ("another", 0))
RECALL = "retrieval/image_to_text/recall@5"
SHOWN = {
    "malignancy, fused": "malignancy/fused/auroc",
    "diameter alone": "malignancy/baseline_diameter/auroc",
    "fused - diameter": "malignancy/fused_minus_baseline_diameter/auroc",
    "table boosted": "malignancy/baseline_table/auroc",
    "spiculation, zero-shot": "spiculation/zero_shot/auroc",
    "recall@5": RECALL,
}


def mmfm(*arguments: str) -> None:
    subprocess.run([Path(sys.executable).with_name("mmfm"), *arguments], check=True)


def measured(split_key: str, seed: int) -> dict[str, dict[str, float]]:
    """The measures of one run by name, trained and evaluated here."""
    store, run = SPLIT_KEYS[split_key], RUNS / f"{split_key}-{seed}"
    mmfm("sample", "lidc", "--out", store, "--split-key", split_key)
    mmfm("train", CONFIG, "--run", str(run), "--seed", str(seed), "--data.store", store)
    mmfm("evaluate", str(run))
    return json.loads((run / "evaluation.json").read_text())


def row(measures: dict[str, dict[str, float]]) -> list[str]:
    cells = [f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})" for m in (measures[n] for n in SHOWN.values())]
    return [*cells, f"{measures[RECALL]['value'] / measures[f'{RECALL}_chance']['value']:.1f}"]


def main() -> None:
    table = Table("split key", "seed", *SHOWN, "times chance", title="Held-out patients, 95% intervals")
    for split_key, seed in CASES:
        table.add_row(split_key, str(seed), *row(measured(split_key, seed)))
    Console().print(table)


if __name__ == "__main__":
    main()
