"""Which releases made a run, and of which stores; what changed since is said, and the run goes on."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmfm_jax import __version__
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.files import replace
from mmfm_jax.train.place import VERSIONS

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")

Versions = dict[str, Any]


def current(store: Studies) -> Versions:
    """Releases by name, and of each store its studies and the checksum of its store.json, which has those of all its
    files."""
    releases = {"mmfm_jax": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            releases[package] = version(package)
        except PackageNotFoundError:  # bundled without its metadata
            continue
    stores = {name: {"studies": len(of), "sha256": of.checksum} for name, of in zip(store.names, store.stores)}
    return {"releases": releases, "stores": stores}


def record(run: Path, now: Versions) -> None:
    """Adds what is new to the run's folder."""
    entries = _read(run)
    if not entries or _without_time(entries[-1]) != now:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        replace(run / VERSIONS, json.dumps([*entries, {"since": since} | now], indent=1) + "\n")


def changed(run: Path, now: Versions) -> list[str]:
    """A sentence about the releases and one about the stores that differ from those that the run was last trained with;
    a run of a release that kept none says nothing."""
    entries = _read(run)
    if not entries:
        return []
    before, told = entries[-1], []
    names = dict.fromkeys([*now["releases"], *before.get("releases", {})])
    held, new = before.get("releases", {}), now["releases"]
    if differ := [f"{n} {held.get(n, 'none')} is now {new.get(n, 'none')}" for n in names if held.get(n) != new.get(n)]:
        told.append(
            f"{run}: goes on under other releases ({', '.join(differ)}); its steps may differ in their last bits."
        )
    stores = before.get("stores", {})
    if differ := [
        f"{name} had {stores[name]['studies']} studies and has {of['studies']}" if name in stores else f"{name} is new"
        for name, of in now["stores"].items()
        if stores.get(name) != of
    ]:
        told.append(
            f"{run}: goes on with another store than it was trained on (store.json differs: {', '.join(differ)}); its "
            "batches are not those of a run on one store."
        )
    return told


def _read(run: Path) -> list[Versions]:
    try:
        entries = json.loads((run / VERSIONS).read_text())
    except (OSError, ValueError):
        return []
    return entries if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) else []


def _without_time(entry: Versions) -> Versions:
    return {name: value for name, value in entry.items() if name != "since"}
