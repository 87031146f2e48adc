"""`make gpu` on a machine without one: every part ends in rows, whatever becomes of it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


def measured(tmp_path, *arguments):
    """What is printed, and the data by part."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path / "gpu.json"), *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "gpu.json").read_text())["parts"]


def test_a_part_gives_rows_of_markdown_and_their_data(tmp_path):
    printed, parts = measured(tmp_path, "--parts", "attention")
    assert "| jax" in printed.splitlines()[0]
    assert [row["what"] for row in parts["attention"]] == [
        "attention 1x64x2x16, xla", "attention 1x64x2x16, blocks", "attention, xla beside blocks",
    ]  # fmt: skip
    for row in parts["attention"]:
        assert f"| {row['what']} | {row['figure']} |" in printed.splitlines()
    took = parts["attention"][-1]["data"]
    assert parts["attention"][-1]["figure"] == f"{took['blocks'] / took['xla']:.2f} times as fast"


def test_a_part_that_fails_or_takes_too_long_is_a_row_that_says_so(tmp_path):
    _, late = measured(tmp_path, "--parts", "attention", "--seconds", "0.01")
    assert late == {"attention": [{"what": "attention", "figure": "stopped after 0.01 s", "data": None}]}
    broken = tmp_path / "wheels/jaxtyping-99-py3-none-any.whl"  # a wheel goes before what is installed
    broken.parent.mkdir()
    with zipfile.ZipFile(broken, "w") as wheel:
        wheel.writestr("jaxtyping/__init__.py", "raise ImportError('this wheel is broken')\n")
        of = "jaxtyping-99.dist-info"
        wheel.writestr(f"{of}/METADATA", "Metadata-Version: 2.1\nName: jaxtyping\nVersion: 99\n")
        wheel.writestr(f"{of}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{of}/RECORD", "")
    printed, failed = measured(tmp_path, "--parts", "attention", "--wheels", str(broken.parent))
    assert "| attention | failed: ImportError: this wheel is broken |" in printed.splitlines()
    assert [row["figure"] for row in failed["attention"]] == ["failed: ImportError: this wheel is broken"]
