"""What a wheel and a source distribution bring, and that what they ask for is what was tested."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import mmfm_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [Requirement(text) for text in [*PROJECT["dependencies"], *(r for of in EXTRAS.values() for r in of)]]
PINNED = {
    one.name.lower(): str(one.specifier).removeprefix("==")
    for one in map(Requirement, re.findall(r"(?m)^[^#\n].*", (ROOT / "constraints.txt").read_text()))
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder that holds a wheel and a source distribution."""
    build = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        build.build_wheel(str(folder))
        build.build_sdist(str(folder))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def test_a_wheel_alone_writes_every_example(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    command = [sys.executable, "-c", "from mmfm_jax.cli import main; main(['init', 'chest_ct']); main(['init'])"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mmfm ingest chest_ct.yaml" in done.stdout
    assert all(f"  {path.stem} " in done.stdout for path in (ROOT / "configs").rglob("*.yaml"))
    assert (tmp_path / "chest_ct.yaml").read_text().startswith("# Chest CT")


def test_a_wheel_says_that_it_is_typed_and_holds_the_configurations_as_they_are(wheel):
    names = set(wheel.namelist())
    assert "mmfm_jax/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"mmfm_jax", f"mmfm_jax-{mmfm_jax.__version__}.dist-info"}
    for path in (ROOT / "configs").rglob("*.yaml"):
        held = wheel.read(f"mmfm_jax/examples/{path.relative_to(ROOT / 'configs')}")
        assert held == path.read_bytes()


def test_a_source_distribution_holds_what_its_documents_and_tests_name(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / "launch/README.md"]
    for document in documents:
        assert str(document.relative_to(ROOT)) in held
        for link in re.findall(r"\]\(([^)#:]+)", document.read_text()):
            path = (document.parent / link).resolve()
            assert path.exists(), f"{document.name}: {link}"
            assert any(name.startswith(str(path.relative_to(ROOT))) for name in held), f"{document.name}: {link}"
    assert {"Makefile", "LICENSE", "CITATION.cff", "CHANGELOG.md", "constraints.txt"} <= held
    for folder in ("tests", "notebooks", "benchmarks", "launch", "configs"):  # what pytest, make and configs name
        here = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in here if "__pycache__" not in name and ".ipynb_checkpoints" not in name} <= held


def test_what_breaks_from_one_release_to_the_next_is_bounded():
    for name in ("jax", "flax", "orbax-checkpoint", "grain", "optax", "tensorstore", "pydantic", "numpy"):
        of_name = [one for one in ASKED if one.name == name]
        assert of_name and all("<" in str(one.specifier) for one in of_name), name


def test_the_constraints_pin_what_is_asked_for_within_its_bounds():
    untested = {"jax-cuda", "hatchling", "idc-index-data", "ray", *(Requirement(r).name for r in EXTRAS["lint"])}
    for one in ASKED:
        if one.name in untested:
            continue
        assert one.specifier.contains(PINNED[one.name.lower()]), one.name


def test_every_extra_that_a_message_or_a_document_names_is_one():
    text = "".join(
        path.read_text() for glob in ("*.md", "docs/*.md", "launch/*", "mmfm_jax/**/*.py", "notebooks/*", "Makefile")
        for path in ROOT.glob(glob) if path.is_file()
    )  # fmt: skip
    named = re.findall(r"(?:mmfm_jax|'\.)\[([a-z0-9,]+)\]", text) + re.findall(r"EXTRAS\s*\??:?=\s*([a-z,]+)", text)
    named += [",".join(re.findall(r'"(\w+)"', call)) for call in re.findall(r"pip_install\(([^)]*)\)", text)]
    assert len(named) > 10
    assert {extra for names in named for extra in names.split(",") if extra} <= set(EXTRAS)


def test_the_citation_and_the_changelog_are_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(cited)
    assert str(cited["version"]) == mmfm_jax.__version__ and cited["license"] == PROJECT["license"]
    latest = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())[0]
    assert latest == mmfm_jax.__version__
