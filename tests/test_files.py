"""What is written goes to its own place: links, other names of a file, folders and devices are not followed."""

import os
import stat
from pathlib import Path

import pytest

from mmfm_jax.errors import UserError
from mmfm_jax.files import open_own, refuse_links, replace, written

MINE = "mine, and nobody else's"


@pytest.fixture
def victim(tmp_path) -> Path:
    path = tmp_path / "victim"
    path.write_text(MINE)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_a_link_at_the_place_gives_way(folder, victim):
    (folder / "page.html").symlink_to(victim)
    (folder / ".page.html.partial").symlink_to(victim)
    replace(folder / "page.html", "ours")
    assert (folder / "page.html").read_text() == "ours" and not (folder / "page.html").is_symlink()
    assert victim.read_text() == MINE


def test_a_name_that_is_taken_is_not_opened(folder, victim, monkeypatch):
    monkeypatch.setattr("mmfm_jax.files.secrets.token_hex", lambda _: "guessed")
    (folder / ".page.html.guessed.partial").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written"):
        replace(folder / "page.html", "ours")
    assert victim.read_text() == MINE and not (folder / "page.html").exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_is_private_is_its_owners_whatever_the_umask(folder, umask):
    before = os.umask(umask)
    try:
        replace(folder / "private", "x", private=True)
        replace(folder / "open", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o600 & ~umask
    assert stat.S_IMODE((folder / "open").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("kind", ["folder", "pipe", "nowhere"])
def test_what_cannot_be_a_file_is_refused_in_one_sentence(folder, kind):
    place = folder / "page.html"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place = folder / "nowhere/page.html"
    with pytest.raises(UserError, match=r"page.html: cannot be written: .*; mend it"):
        replace(place, "ours", mend="mend it")
    assert [p.name for p in folder.iterdir()] == ([] if kind == "nowhere" else ["page.html"])


def test_a_write_that_fails_leaves_what_was_there(folder):
    replace(folder / "page", "before")
    with pytest.raises(KeyError), written(folder / "page") as file:
        file.write(b"half")
        raise KeyError
    assert (folder / "page").read_text() == "before" and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("lay", [Path.symlink_to, Path.hardlink_to], ids=["link", "other name"])
def test_what_is_appended_to_is_no_link_and_has_one_name(folder, victim, lay):
    lay(folder / "log", victim)
    with pytest.raises(OSError):
        open_own(folder / "log", os.O_WRONLY | os.O_APPEND)
    assert victim.read_text() == MINE
    os.close(open_own(folder / "other", os.O_WRONLY | os.O_APPEND))


def test_a_pipe_is_no_log_and_holds_nobody_up(folder):
    os.mkfifo(folder / "log")
    with pytest.raises(OSError):
        open_own(folder / "log", os.O_RDWR | os.O_APPEND)


def test_a_folder_that_holds_a_link_is_not_written_into(folder, victim):
    refuse_links(folder)
    refuse_links(folder / "not there")
    (folder / "stalls").symlink_to(victim.parent)
    with pytest.raises(UserError, match="stalls: is a link"):
        refuse_links(folder)
