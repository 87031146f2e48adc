"""What collectives cost: which devices talk, over which links, for how long.

Ring algorithms on a torus, as in jax-ml.github.io/scaling-book/sharding: of an all-gather of B bytes among n devices,
(n - 1) / n B enter each, over every link of the axes that the group spans, both ways where an axis closes to a ring.
Between slices each chip sends its own shard over its share of the host's network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfm_jax.parallel.mesh import slice_of
from mmfm_jax.plan.chips import Chip
from mmfm_jax.plan.hlo import COLLECTIVES, Computation, Instruction

HOP_SECONDS = 1e-6  # from chip to chip, of the order that the scaling book gives
NETWORK_SECONDS = 2e-5  # between hosts of two slices: an assumption
ICI, DCN = "ici", "dcn"
BETWEEN_SLICES = {  # what libtpu sends between n slices: the collective that it does, bytes in for each byte sent
    "ALL_REDUCE": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "REDUCE_SCATTER": ("reduce-scatter", lambda n: (n - 1) / n),
    "ALL_GATHER": ("all-gather", lambda n: n - 1),
    "ALL_TO_ALL": ("all-to-all", lambda n: (n - 1) / n),
    "ONE_TO_ONE": ("collective-permute", lambda n: 1.0),
}


@dataclass(frozen=True)
class Transfer:
    """One collective, seen from one device."""

    kind: str
    bytes: dict[str, float]
    """That enter the device, by link."""
    seconds: dict[str, float]


class Network:
    """The links between the devices of a mesh, given in the order of the program's device numbers."""

    def __init__(self, devices: Iterable[Any], chip: Chip):
        self._chip, devices = chip, list(devices)
        self._slice = np.array([slice_of(device) for device in devices])
        self._place = np.array([tuple(device.coords) for device in devices])
        self._extent = self._place.max(axis=0) + 1

    @property
    def size(self) -> int:
        return len(self._slice)

    def transfer(self, computation: Computation, instruction: Instruction, scattered: bool = False) -> Transfer:
        """Cost of a collective. `scattered`: an all-reduce of which each device keeps a shard, a reduce-scatter."""
        kind = instruction.opcode.removesuffix("-start")
        held = sum(computation.by_name[name].bytes for name in instruction.operands if name in computation.by_name)
        if kind == "send":
            return self._between_slices(held, instruction)
        if kind == "collective-permute":
            return self._permute(held, pairs(instruction))
        group = groups(instruction, self.size)[0]
        if kind == "all-reduce" and scattered:
            kind = "reduce-scatter"
        made = instruction.bytes - (held if instruction.opcode.endswith("-start") else 0)
        payload = made if kind == "all-gather" else held
        return self._ring(kind, payload, group)

    def _between_slices(self, payload: float, instruction: Instruction) -> Transfer:
        """Each chip hands its host what its peers in the other slices are to have."""
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        kind, share = BETWEEN_SLICES[found.group(1) if found else "ONE_TO_ONE"]
        count = payload * share(len(set(self._slice.tolist())))
        seconds = count / (self._chip.dcn_bandwidth / self._chip.devices) + NETWORK_SECONDS
        return Transfer(kind, {DCN: count}, {DCN: seconds})

    def _ring(self, kind: str, payload: float, group: np.ndarray) -> Transfer:
        slices = len(set(self._slice[group].tolist()))
        within = len(group) // slices
        rounds = 2 if kind == "all-reduce" else 1
        near = rounds * payload * (within - 1) / within
        far = rounds * payload / within * (slices - 1) / slices
        axes, ways, hops = self._span(group[self._slice[group] == self._slice[group[0]]])
        seconds = near / (ways * self._chip.link_bandwidth / self._chip.devices) if near else 0.0
        if kind == "all-to-all" and within > 1:  # each byte takes a quarter of a ring on average, and a link is shared
            far = payload * (slices - 1) / slices
            seconds *= max(within ** (1 / axes) / 4, 1) if axes else 1
        times = {ICI: seconds + rounds * hops * HOP_SECONDS} if near else {}
        if far:
            times[DCN] = far / (self._chip.dcn_bandwidth / self._chip.devices) + rounds * NETWORK_SECONDS
        return Transfer(kind, {link: count for link, count in ((ICI, near), (DCN, far)) if count}, times)

    def _span(self, group: np.ndarray) -> tuple[int, int, int]:
        """Axes of the torus that devices of one slice span, links a device has along them, and hops across."""
        extent = np.ptp(self._place[group], axis=0) + 1
        axes = int((extent > 1).sum())
        closed = [bool(e == whole and self._closes(whole)) for e, whole in zip(extent, self._extent)]
        ways = sum(2 if ring else 1 for e, ring in zip(extent, closed) if e > 1)
        hops = sum(int(e) // 2 if ring else int(e) - 1 for e, ring in zip(extent, closed) if e > 1)
        return axes, max(ways, 1), max(hops, 1)

    def _closes(self, extent: int) -> bool:
        """Whether an axis of a slice is a ring: whole axes of 16 in the plane, multiples of 4 in the cube [doc]."""
        return extent % 4 == 0 if self._chip.links == 6 else extent == 16

    def _permute(self, payload: float, moves: np.ndarray) -> Transfer:
        """Each device sends to one other. Messages of many hops share the links on their way."""
        source, target = moves[:, 0], moves[:, 1]
        if (self._slice[source] != self._slice[target]).any():
            seconds = payload / (self._chip.dcn_bandwidth / self._chip.devices) + NETWORK_SECONDS
            return Transfer("collective-permute", {DCN: payload}, {DCN: seconds})
        steps = np.abs(self._place[source] - self._place[target])
        rings = np.array([self._closes(int(whole)) for whole in self._extent])
        steps = np.where(rings, np.minimum(steps, self._extent - steps), steps).sum(axis=1)
        hops = max(float(steps.mean()), 1.0)
        links = 1 if hops == 1 else self._chip.links / 2  # half of them lead the right way
        seconds = payload * hops / (links * self._chip.link_bandwidth / self._chip.devices)
        return Transfer("collective-permute", {ICI: payload}, {ICI: seconds + float(steps.max()) * HOP_SECONDS})


def is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def rendezvous(instruction: Instruction) -> str | None:
    """The name under which a `send` meets its `recv`, of those that cross slices; libtpu makes them of the collectives
    of several slices, of which it leaves the parts within each as collectives."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', instruction.attributes)
    return found.group(1) if found and instruction.opcode in ("send", "recv") else None


def pairs(instruction: Instruction) -> np.ndarray:
    """[pair, 2] of a permutation: source and target."""
    found = re.search(r"source_target_pairs={(.*?)}}", instruction.attributes)
    numbers = re.findall(r"\d+", found.group(1)) if found else ["0", "0"]
    return np.array(numbers, int).reshape(-1, 2)


def groups(instruction: Instruction, devices: int) -> np.ndarray:
    """[group, member] of device numbers: from lists, from `[2,8]<=[8,2]T(1,0)`, or from axes of a mesh."""
    text = instruction.attributes
    if found := re.search(r"replica_groups={({.*?})}", text):
        return np.array([re.findall(r"\d+", group) for group in re.findall(r"{([^}]*)}", found.group(1))], int)
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(found.group(1))
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? {([^}]*)}", text):
        sizes, order, axes = found.groups()
        names = re.findall(r"'([^']+)'=(\d+)", sizes)
        numbers = np.arange(math.prod(int(size) for _, size in names))
        if order:
            numbers = _iota(re.sub(r"^(\[[\d,]+\])", rf"[{numbers.size}]<=\1", order))
        return _along(numbers, names, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes))
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    shape, source, order = found.groups()
    sizes = [int(size) for size in source.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        numbers = numbers.transpose([int(axis) for axis in order.split(",")])
    return numbers.reshape([int(size) for size in shape.split(",")])


def _along(numbers: np.ndarray, names: list[tuple[str, str]], axes: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along axes of a mesh; `'a':(2)4` is the part of size 4 that has 2 of the axis before it."""
    sizes, chosen, wanted = [], [], {name: (before, size) for name, before, size in axes}
    for name, text in names:
        whole = int(text)
        before, size = wanted.get(name, ("", ""))
        parts = [int(before), int(size), whole // (int(before) * int(size))] if size else [whole]
        if name in wanted:
            chosen.append(len(sizes) + (1 if size else 0))
        sizes += parts
    rest = [axis for axis in range(len(sizes)) if axis not in chosen]
    members = math.prod(sizes[axis] for axis in chosen)
    return numbers.reshape(sizes).transpose(rest + chosen).reshape(-1, members)
