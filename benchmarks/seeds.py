"""Whether the demo's result holds: three seeds on one split of the patients, and one seed on another split.

Run by `make seeds`, about ten minutes a run on 2 cores. A run that is finished is not trained again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from mmfm_jax.screen import make_console

CONFIG = "configs/demo.yaml"
RUNS = Path("runs/seeds")
SPLIT_KEYS = {"mmfm": "data/lidc", "another": "data/lidc-another"}  # and the store of each
CASES = (("mmfm", 0), ("mmfm", 1), ("mmfm", 2), ("another", 0))
SHOWN = (
    "malignancy/fused/auroc",
    "malignancy/baseline_sentences_and_table/auroc",
    "malignancy/fused_minus_baseline_sentences_and_table/auroc",
    "malignancy/fused_first_text/auroc",
    "malignancy/baseline_first_sentences_and_table/auroc",
    "malignancy/fused_without_text/auroc",
    "malignancy/fused_without_table_text/auroc",
    "malignancy/baseline_image/auroc",
    "malignancy/baseline_diameter/auroc",
    "malignancy/fused/calibration_error",
    "malignancy/fused/tempered_calibration_error",
    *(
        f"{label}/{of}/auroc"
        for label in ("spiculation", "lobulation", "margin", "calcification")
        for of in ("zero_shot", "baseline_image", "zero_shot_minus_baseline_image")
    ),
    *(f"retrieval/{way}/recall@5" for way in ("image_to_text", "text_to_image", "image_to_table", "table_to_image")),
)


def mmfm(*arguments: str) -> None:
    subprocess.run([Path(sys.executable).with_name("mmfm"), *arguments], check=True)


def measured(split_key: str, seed: int, share: float = 1.0) -> dict[str, dict[str, float]]:
    """The measures of one run by name, trained here on a share of the training patients and evaluated."""
    store = SPLIT_KEYS[split_key]
    run = RUNS / (f"{split_key}-{seed}" if share == 1 else f"{split_key}-{seed}-share-{share:g}")
    mmfm("sample", "lidc", "--out", store, "--split-key", split_key)
    data = ("--data.store", store, "--data.train-share", str(share))
    mmfm("train", CONFIG, "--run", str(run), "--seed", str(seed), *data)
    mmfm("evaluate", str(run))
    return json.loads((run / "evaluation.json").read_text())


def cell(measures: dict[str, dict[str, float]], name: str) -> str:
    """One measure: with its interval or, where it has a chance level, as a multiple of that."""
    m, chance = measures[name], measures.get(f"{name}_chance")
    if chance:
        return f"{m['value']:.3f} ({m['value'] / chance['value']:.1f} x chance)"
    return f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})"


def main() -> None:
    runs = {f"split {key}, seed {seed}": measured(key, seed) for key, seed in CASES}
    table = Table("measure", *runs, title="Held-out patients, 95% intervals")
    for name in SHOWN:
        table.add_row(name, *(cell(measures, name) for measures in runs.values()))
    make_console(width=160).print(table)


if __name__ == "__main__":
    main()
