"""Whether products in eight bits learn as bfloat16 does: the demo's first steps in each precision, on the same batches.

Run by `make precision`; several minutes a run on 2 cores, for a CPU has no such products and works them out in float32.
A run that is finished is not trained again.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from rich.table import Table
from seeds import CONFIG, SPLIT_KEYS, mmfm

from mmfm_jax.screen import make_console

RUNS = Path("runs/precision")
STEPS = 400
LAST = 100  # steps whose losses are averaged
STACKS = ("vision", "text", "table", "fusion")
LOW = ("--model.dtype", "bfloat16")
WAYS = {
    "float32": ("--model.dtype", "float32"),
    "bfloat16": LOW,
    **{bits: (*LOW, *(word for s in STACKS for word in (f"--model.{s}.precision", bits))) for bits in ("int8", "fp8")},
}


def measured(name: str) -> dict[str, float]:
    """Losses of a run by name: means of its last steps, and those of held-out patients at its end."""
    run = RUNS / name
    steps = ("--train.steps", str(STEPS), "--train.validate-every", str(STEPS), "--train.log-every", "1")
    mmfm("train", CONFIG, "--run", str(run), *steps, *WAYS[name])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line and line["step"] > STEPS - LAST]
    names = [name for name in trained[0] if name == "loss" or name.endswith("/loss")]
    held_out = next(line for line in reversed(lines) if "validation/loss" in line)
    return {name: fmean(line[name] for line in trained) for name in names} | {
        name: value for name, value in held_out.items() if name.startswith("validation/") and name.endswith("loss")
    }


def main() -> None:
    store = SPLIT_KEYS["mmfm"]
    mmfm("sample", "lidc", "--out", store)
    losses = {name: measured(name) for name in WAYS}
    table = Table("loss", *losses, title=f"Means of steps {STEPS - LAST + 1} to {STEPS}, and of held-out patients then")
    for name in losses["bfloat16"]:
        table.add_row(name, *(f"{of[name]:.4f}" for of in losses.values()))
    for name in ("loss", "validation/loss"):
        less = {way: 100 * (of[name] / losses["bfloat16"][name] - 1) for way, of in losses.items()}
        table.add_row(f"{name} beside bfloat16", *(f"{percent:+.1f}%" for percent in less.values()))
    make_console(width=120).print(table)


if __name__ == "__main__":
    main()
