"""Help answers at once and names an example for each verb."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERBS = ("init", "sample", "ingest", "rejects", "inspect", "train", "evaluate", "plan", "bench", "schema")


def test_help_imports_neither_jax_nor_anything_else_that_is_slow():
    code = (
        "import sys, mmfm_jax.cli\n"
        "try: mmfm_jax.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_says_what_it_does_with_an_example(verb, capsys):
    from mmfm_jax.cli import main

    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and f"mmfm {verb}" in printed and "example:" in printed


def test_the_schema_is_one_an_editor_can_use(capsys):
    import json

    from mmfm_jax.cli import main

    main(["schema"])
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    kinds = schema["properties"]["tasks"]["additionalProperties"]["discriminator"]["mapping"]
    assert set(kinds) == {"contrastive", "masked", "classification", "caption", "image_numbers"}


@pytest.mark.parametrize(
    "of, file",
    [
        (["experiment"], "configs/experiment.schema.json"),
        (["experiment", "--markdown"], "docs/experiment.md"),
        (["dataset", "--markdown"], "docs/dataset.md"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_committed_schema_is_current(of, file, capsys):
    from mmfm_jax.cli import main

    main(["schema", *of])
    committed = Path(__file__).parents[1] / file
    assert committed.read_text() == capsys.readouterr().out, f"run: mmfm schema {' '.join(of)} > {file}"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"MMFM_CPU_DEVICES": "two"}, "MMFM_CPU_DEVICES=two: is not a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
    ],
)
def test_an_environment_that_names_no_group_is_refused(monkeypatch, environment, expected):
    from mmfm_jax.errors import UserError
    from mmfm_jax.parallel.processes import start_processes

    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "MMFM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        start_processes()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_verb_that_computes_starts_anew_once_with_the_same_words_in_huge_pages(tmp_path):
    """Seen from outside: what the process that answers was given, and that its pid is the one that was started."""
    shown = "import os, sys; open(sys.argv.pop(1), 'a').write(f'{os.getpid()} {os.environ.get(\"GLIBC_TUNABLES\")}\\n')"
    script = tmp_path / "mmfm.py"
    script.write_text(f"{shown}; from mmfm_jax.cli import main; main()")
    log, environment = tmp_path / "log", {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, str(script), str(log), "evaluate", str(tmp_path / "no run")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "no run" in said
    assert log.read_text().split() == [str(process.pid), "None", str(process.pid), "glibc.malloc.hugetlb=1"]
