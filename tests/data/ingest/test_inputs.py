"""Inputs are found by pattern below the root, and nothing that leads out of it is opened."""

import os

import pytest

from mmfm_jax.data.ingest.inputs import Files, look_at, pattern


@pytest.fixture
def tree(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (
        "root/a.dcm",
        "root/ct/1/b.dcm",
        "root/ct/2/c.dcm",
        "root/.hidden/d.dcm",
        "root/.e.dcm",
        "outside/f.dcm",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    (root / "in.dcm").symlink_to(root / "a.dcm")
    (root / "out.dcm").symlink_to(outside / "f.dcm")
    (root / "ct/out").symlink_to(outside)
    (root / "ct/loop").symlink_to(root)
    (root / "gone.dcm").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.dcm")
    return root


def test_what_is_found(tree):
    found = {path: one.refused.reason if one.refused else "" for path, one in Files(tree).by_path.items()}
    assert found == {
        "a.dcm": "",
        "ct/1/b.dcm": "",
        "ct/2/c.dcm": "",
        "in.dcm": "",
        "out.dcm": "outside_root",
        "ct/out": "outside_root",
        "gone.dcm": "missing_file",
        "pipe.dcm": "not_a_file",
    }
    assert list(found) == list(Files(tree).by_path)  # always in the same order


def test_a_file_or_the_files_of_a_folder(tree):
    files = Files(tree)
    assert [one.path for one in files.at("ct/1")] == ["ct/1/b.dcm"]
    assert [one.path for one in files.at("a.dcm")] == ["a.dcm"]
    assert {one.path for one in files.at("ct/")} == {"ct/1/b.dcm", "ct/2/c.dcm", "ct/out"}
    for path in ("../outside/f.dcm", "/etc/hostname", "ct/../../outside/f.dcm", "ct/out/f.dcm", "a\0b", "", "."):
        (one,) = files.at(path)
        assert one.refused is not None, path
    refused = look_at(tree, "nothing.dcm").refused
    assert refused is not None and refused.reason == "missing_file"


@pytest.mark.parametrize(
    ("glob", "matches", "misses"),
    [
        ("**/*.dcm", ["a.dcm", "x/y/a.dcm"], ["a.dcm.txt", "a_dcm"]),
        ("ct/**", ["ct/a", "ct/x/y"], ["mr/ct/a"]),
        ("ct/*/a?.dcm", ["ct/1/a1.dcm"], ["ct/1/2/a1.dcm", "ct/1/a.dcm"]),
        ("ct/**/x/*.dcm", ["ct/x/a.dcm", "ct/1/2/x/a.dcm"], ["ct/xx/a.dcm"]),
        ("a[1].(x)", ["a[1].(x)"], ["a1.(x)"]),
    ],
)
def test_patterns(glob, matches, misses):
    assert all(pattern(glob).match(path) for path in matches)
    assert not any(pattern(glob).match(path) for path in misses)
