"""The demo's learning curve: the same steps on a quarter, half and all of the training patients, one test split.

Run by `make curve`, about ten minutes a run on 2 cores. A run that is finished is not trained again, and the run on all
patients is that of `make seeds`.
"""

from __future__ import annotations

import numpy as np
from rich.table import Table
from seeds import SPLIT_KEYS, cell, measured

from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.screen import make_console

SHARES = (0.25, 0.5, 1.0)
SEEDS = (0, 1)
SHOWN = (
    "malignancy/fused/auroc",
    "spiculation/zero_shot/auroc",
    *(f"retrieval/{way}/recall@5" for way in ("image_to_text", "text_to_image", "image_to_table", "table_to_image")),
)


def patients(share: float) -> int:
    """That are trained on."""
    store = StudyStore.open(SPLIT_KEYS["mmfm"], share)
    return len(np.unique(store.patients(store.rows("train"))))


def main() -> None:
    runs = {(share, seed): measured("mmfm", seed, share) for seed in SEEDS for share in SHARES}
    table = Table("measure", title="Held-out patients by training patients, 95% intervals")
    for share, seed in runs:
        table.add_column(f"{patients(share)} patients, seed {seed}")
    for name in SHOWN:
        table.add_row(name, *(cell(measures, name) for measures in runs.values()))
    make_console(width=200).print(table)


if __name__ == "__main__":
    main()
