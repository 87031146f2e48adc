"""The leaves of a pytree by dotted path, such as `params.model.fusion.latents`; a checkpoint holds them so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

NUMBERED = re.compile(r"\d{5}\.")
"""What stood before each name in the checkpoints of releases that numbered leaves."""


def dotted(path: tuple) -> str:
    """The name of a leaf: keys, fields and indices from the root, without the `value` of a flax variable."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return ".".join(name for name in names if name not in ("value", ""))


def named(tree: Any) -> dict[str, Any]:
    """Every leaf by its name, in the order of the names. Raises ValueError where two leaves have one name."""
    leaves = [(dotted(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    if len(dict(leaves)) < len(leaves):
        raise ValueError("two leaves of a tree have one name")
    return dict(sorted(leaves))


def renamed(tree: Any, leaf_of: Callable[[str, Any], Any]) -> Any:
    """The tree with each leaf replaced by `leaf_of(name, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf_of(dotted(path), leaf), tree)


def stored_names(stored: Iterable[str]) -> dict[str, str]:
    """What each leaf is called in a checkpoint, by its name: the same, but for a number where leaves were numbered."""
    stored = list(stored)
    numbered = bool(stored) and all(NUMBERED.match(name) for name in stored)
    return {NUMBERED.sub("", name, count=1) if numbered else name: name for name in stored}


def differences(held: dict[str, Any], wanted: dict[str, Any], surplus: bool) -> str:
    """In what leaves that are held (anything with shape and dtype, by name) are not those wanted; "" where in nothing.

    `surplus`: whether leaves that nobody wants are a difference.
    """

    def kind(leaf) -> str:
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    missing = [name for name in wanted if name not in held]
    more = [name for name in held if name not in wanted] if surplus else []
    other = [
        f"{name} ({kind(held[name])} for {kind(leaf)})"
        for name, leaf in wanted.items()
        if name in held and kind(held[name]) != kind(leaf)
    ]
    parts = {"it lacks": missing, "it holds besides": more, "of another shape are": other}
    return "; ".join(f"{what} {_some(names)}" for what, names in parts.items() if names)


def _some(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest
