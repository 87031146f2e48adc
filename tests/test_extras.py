"""Without the packages of an extra a verb says so in one sentence, and what trains needs none of them."""

import ast
from pathlib import Path

import pytest

from mmfm_jax import extras
from mmfm_jax.cli import main
from mmfm_jax.errors import UserError
from mmfm_jax.extras import check_installed

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without(monkeypatch):
    """`without("matplotlib")`: as where these packages are not installed."""

    def without(*packages: str) -> None:
        monkeypatch.setattr(extras, "find_spec", lambda name: None if name in packages else name)

    return without


def test_what_is_missing_is_named_with_the_command_that_brings_it(without):
    without("b", "c")
    with pytest.raises(UserError) as said:
        check_installed("x", ["a", "b", "c"], "one", "two")
    assert str(said.value) == (
        "x needs b and c, which are not installed; run `pip install 'mmfm_jax[one,two]'`, or in a checkout "
        "`pip install '.[one,two]'`"
    )
    check_installed("x", ["a"], "one")


def test_evaluate_says_before_anything_else_that_it_needs_the_extra(without, capsys, tmp_path):
    without("sklearn")
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", str(tmp_path)])
    assert exit.value.code == 2
    assert "evaluate needs sklearn, which is not installed; run `pip install 'mmfm_jax[evaluate]'`" in (
        capsys.readouterr().err
    )


def imported_at_once(name: str, seen: set[str]) -> None:
    """Adds all that importing a module of ours imports; what stands in functions is imported later, if ever."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    if name in seen or not path.exists():
        return
    seen.add(name)
    tree = ast.parse(path.read_text())
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for imported in names:
            if imported.startswith("mmfm_jax"):
                imported_at_once(imported, seen)
            else:
                seen.add(imported.partition(".")[0])


@pytest.mark.parametrize("module", ["train.loop", "plan.command", "data.feed.worker", "data.ingest.run", "tasks"])
def test_what_trains_plans_or_reads_imports_no_package_of_an_extra(module):
    seen = set()
    for name in [f"mmfm_jax.{module}", *(f"mmfm_jax.tasks.{path.stem}" for path in ROOT.glob("mmfm_jax/tasks/*.py"))]:
        imported_at_once(name, seen)
    assert {"jax", "numpy", "mmfm_jax.metrics.findings"} <= seen
    assert not {"matplotlib", "sklearn", "nibabel", "pydicom", "SimpleITK", "torch", "transformers", "qwix"} & seen
