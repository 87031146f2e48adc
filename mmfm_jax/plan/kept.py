"""Plans kept beside the configurations: what each pair of configuration and pod was found to need, and of which text.

A plan of a pod takes minutes, so tests compare a hash of what a plan depends on; `make pods` plans all of them anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from math import prod
from typing import Any

from mmfm_jax.plan.chips import CHIPS

KEPT = "configs/pods.json"
DEPENDS = ("inputs", "model", "tasks", "optimizer")
OF_DATA = ("vocabulary_size", "augment")
OF_TRAIN = ("batch_size", "accumulate", "ema_decay")


@dataclass(frozen=True)
class Pair:
    """A configuration and the pod that it is for."""

    config: str
    topology: str
    slices: int = 1

    @property
    def devices(self) -> int:
        kind, _, shape = self.topology.partition(":")
        return prod(map(int, shape.split("x"))) * CHIPS[kind].devices * self.slices


def named(text: str) -> set[Pair]:
    """Every `mmfm plan CONFIG --topology TOPOLOGY [--slices N]` of a document that gives a file and a pod."""
    found = re.findall(r"mmfm plan (configs/\S+\.yaml) --topology (\w+:[\dx]+)(?: --slices (\d+))?", text)
    return {Pair(config, topology, int(slices or 1)) for config, topology, slices in found}


def digest(raw: dict[str, Any], devices: int) -> str:
    """Of a configuration as YAML gives it: what its step is compiled from, with a mesh axis of -1 worked out, so that
    two texts of one program are the same."""
    mesh = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1, **raw.get("mesh", {})}
    rest = devices // prod(size for size in mesh.values() if size != -1)
    kept = {name: raw.get(name) for name in DEPENDS}
    kept["mesh"] = {axis: rest if size == -1 else size for axis, size in mesh.items()}
    kept["data"] = {name: raw.get("data", {}).get(name) for name in OF_DATA}
    kept["train"] = {name: raw.get("train", {}).get(name) for name in OF_TRAIN}
    optimizer = dict(kept["optimizer"] or {})
    kept["optimizer"] = {name: optimizer.get(name) for name in ("kind", "state_dtype", "groups")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
