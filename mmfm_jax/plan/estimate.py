"""How long a compiled step takes: its schedule played through once, with the compiler's own cycles where it gives them.

Three things happen at the same time and each goes through its own work in order: the cores, the links, and the copies
between HBM and VMEM. A collective or copy that has a start and a done costs what the cores wait for it at its done; one
that has none, all it takes. Loops cost their body times their turns.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

from mmfm_jax.plan.chips import Chip
from mmfm_jax.plan.hlo import Computation, Instruction, Module
from mmfm_jax.plan.links import Network, Transfer, is_collective, rendezvous

# Operations of the vector unit for each score in an attention kernel, taken to run after the products and never beside
# them. No kernel was measured here. The figure of forward is what a published run leaves: on v6e a diffusion model of
# 14e9 parameters at 75,600 tokens took 2.3e-12 s a score of a head of 128, communication counted too, of which the
# products of its half-filled unit need 1.1e-12 (github.com/AI-Hypercomputer/maxdiffusion/pull/376: 251 s for 80 passes,
# 8 chips). Max, difference, sum and cast make four of them and exp the rest; backward has a difference, a product and
# two casts more, and neither max nor sum.
VECTOR_OPERATIONS = {"forward": 8.5, "dq": 9.5, "dkv": 9.5, "backward": 9.5}
# Of the published bandwidth, in kernels that only pass through memory; not measured here.
STREAMED = 0.8
MATMULS = {"forward": 2, "dq": 3, "dkv": 4, "backward": 5}  # of 2 x query x key x head FLOPs each
MATRIX_UNIT = {"v6e": 256, "tpu7x": 256}  # its width, elsewhere 128: a narrower head leaves the rest of it idle
CATEGORIES = ("matmul", "kernels", "other fusions", "copies", "collectives exposed")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain",
}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
MOVES = {
    "copy", "reshape", "transpose", "slice", "concatenate", "pad", "dynamic-slice", "dynamic-update-slice", "reverse",
    "copy-start", "copy-done", "slice-start", "slice-done", "bitcast-convert", "custom-call",
}  # fmt: skip


@dataclass
class Item:
    """An operation of the program, over all times that it runs in a step."""

    name: str
    op_name: str
    category: str
    seconds: float = 0.0
    flops: float = 0.0
    count: int = 0


@dataclass
class Estimate:
    """Of one device and one step."""

    seconds: float = 0.0
    flops: float = 0.0
    """Of the program, what is computed anew for backward counted too."""
    items: dict[tuple[str, str], Item] = field(default_factory=dict)
    collective_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    """By kind and by link."""
    collective_seconds: float = 0.0
    """Hidden behind computing or not."""

    @property
    def by_category(self) -> dict[str, float]:
        """Seconds."""
        total: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
        for item in self.items.values():
            total[item.category] += item.seconds
        return total

    def largest(self, count: int = 10) -> list[Item]:
        """Those that take longest; what the blocks of an unrolled stack have alike is one item."""
        merged: dict[tuple, Item] = {}
        for item in self.items.values():
            once = f"{item.seconds / max(item.count, 1):.1e}"
            same = merged.setdefault(
                (item.op_name, item.category, once), replace(item, seconds=0.0, flops=0.0, count=0)
            )
            same.seconds += item.seconds
            same.flops += item.flops
            same.count += item.count
        return sorted(merged.values(), key=lambda item: -item.seconds)[:count]


def estimate(module: Module, chip: Chip, network: Network) -> Estimate:
    player = _Player(module, chip, network)
    player.play(module.computations[module.entry], 1)
    player.out.seconds = sum(item.seconds for item in player.out.items.values())
    return player.out


class _Player:
    def __init__(self, module: Module, chip: Chip, network: Network):
        self.module, self.chip, self.network, self.out = module, chip, network, Estimate()
        self.peak, self.bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices

    def play(self, computation: Computation, times: int) -> float:
        """Seconds of one run of a computation; its items are counted `times` over."""
        clock, free, under_way = 0.0, defaultdict(float), {}

        def begin(key: str, seconds: dict[str, float]) -> None:
            """Queues work on links or for copies; it ends when the last of them has done its part."""
            for resource, took in seconds.items():
                free[resource] = max(free[resource], clock) + took
            under_way[key] = max((free[resource] for resource in seconds), default=clock)

        def wait(key: str, instruction: Instruction, category: str) -> None:
            nonlocal clock
            left = max(under_way.pop(key, clock) - clock, 0.0)
            clock += left
            self._add(computation, instruction, category, left, times)

        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode in FREE or (opcode == "custom-call" and instruction.target in FREE_CALLS):
                continue
            if opcode == "while":
                turns = self.module.trip_count(computation, instruction)
                clock += turns * self.play(self.module.computations[instruction.called[0]], times * turns)
            elif opcode == "conditional":
                clock += self._branch(instruction, times)
            elif opcode == "call":
                clock += self.play(self.module.computations[instruction.called[0]], times)
            elif opcode in ("copy-start", "slice-start"):
                begin(instruction.name, {"copies": instruction.shapes[-2].padded_bytes / self.bandwidth})
            elif opcode in ("copy-done", "slice-done"):
                wait(instruction.operands[0], instruction, "copies")
            elif is_collective(instruction):
                transfer = self._transfer(computation, instruction, times)
                begin(instruction.name, transfer.seconds)
                if not opcode.endswith("-start"):
                    wait(instruction.name, instruction, "collectives exposed")
            elif met := rendezvous(instruction):
                if opcode == "send":
                    begin(met, self._transfer(computation, instruction, times).seconds)
            elif opcode == "recv-done":
                met = rendezvous(computation.by_name[instruction.operands[0]])
                wait(met or instruction.operands[0], instruction, "collectives exposed")
            elif opcode.endswith("-done") and instruction.operands:
                wait(instruction.operands[0], instruction, "collectives exposed")
            else:
                role, found = self._collectives(instruction)
                if role != "continued":
                    for key, owner, inner in found if role != "done" else ():
                        scattered = owner.name.startswith("all-reduce-scatter")
                        begin(key, self._transfer(owner, inner, times, scattered).seconds)
                    for key, _, _ in found if role != "start" else ():
                        wait(key, instruction, "collectives exposed")
                if not found or role == "continued":  # the compiler gives cycles of the part that computes
                    took, category, flops = self._compute(computation, instruction)
                    clock += took
                    self._add(computation, instruction, category, took, times, flops)
        return clock

    def _branch(self, instruction: Instruction, times: int) -> float:
        """The branch that takes longest; the items of the others are dropped."""
        kept = best = self.out
        longest = 0.0
        for name in instruction.called:
            self.out = copy.deepcopy(kept)
            seconds = self.play(self.module.computations[name], times)
            if seconds >= longest:
                longest, best = seconds, self.out
        self.out = best
        return longest

    def _collectives(self, instruction: Instruction) -> tuple[str, list[tuple[str, Computation, Instruction]]]:
        """The collectives in a fusion and whether it starts, continues or ends them; `whole` when it does all.

        TPU programs start a collective in one fusion, go on with it inside others that compute, and end it in a last;
        all parts carry the same chain_id.
        """
        found, role = [], "whole"
        for name in instruction.called if instruction.opcode == "fusion" else ():
            computation = self.module.computations[name]
            for inner in computation.instructions:
                if is_collective(inner):
                    chain = _chain(inner)
                    found.append((f"chain {chain}" if chain else inner.name, computation, inner))
                    role = "continued" if chain and role == "whole" else role
                elif inner.target in ("AsyncCollectiveStart", "AsyncCollectiveDone"):
                    role = "start" if inner.target == "AsyncCollectiveStart" else "done"
        return role, found

    def _transfer(self, computation: Computation, instruction: Instruction, times: int, scattered=False) -> Transfer:
        transfer = self.network.transfer(computation, instruction, scattered)
        for link, count in transfer.bytes.items():
            by_link = self.out.collective_bytes.setdefault(transfer.kind, {})
            by_link[link] = by_link.get(link, 0.0) + count * times
        self.out.collective_seconds += times * max(transfer.seconds.values(), default=0.0)
        return transfer

    def _compute(self, computation: Computation, instruction: Instruction) -> tuple[float, str, float]:
        """Seconds, category and FLOPs of an operation that computes or copies."""
        if instruction.target == "tpu_custom_call":
            return self._kernel(computation, instruction)
        flops = self.module.flops(computation, instruction)
        if instruction.cycles is not None:
            seconds = instruction.cycles / self.chip.clock
        else:
            touched = [*instruction.shapes]
            for name in instruction.operands:
                touched += computation.by_name[name].shapes if name in computation.by_name else ()
            in_hbm = sum(shape.padded_bytes for shape in touched if not shape.on_chip)
            if instruction.opcode in ("dynamic-update-slice", "gather", "dynamic-slice"):  # touch a part alone
                in_hbm = 2 * min(shape.padded_bytes for shape in touched if shape.size > 1) if touched else 0.0
            seconds = max(flops / self.peak, in_hbm / self.bandwidth)
        return seconds, self._category(instruction, flops), flops

    def _category(self, instruction: Instruction, flops: float) -> str:
        if flops:
            return "matmul"
        inside = {inner.opcode for inner in self.module.inside(instruction)} | {instruction.opcode}
        return "copies" if inside - {"fusion"} <= MOVES | FREE else "other fusions"

    def _kernel(self, computation: Computation, instruction: Instruction) -> tuple[float, str, float]:
        """A Pallas kernel: attention by the shapes of queries and keys, any other by its bytes alone."""
        operands = [computation.by_name[name].shapes[0] for name in instruction.operands if name in computation.by_name]
        arrays = [shape for shape in operands if shape.dtype.startswith(("bf", "f")) and len(shape.dims) >= 3]
        moved = sum(shape.padded_bytes for shape in (*operands, *instruction.shapes) if not shape.on_chip)
        kind = kernel_kind(f"{instruction.name} {instruction.op_name}")
        if kind == "other" or len(arrays) < 2:
            return moved / (STREAMED * self.bandwidth), "kernels", 0.0
        (*_, head), keys = arrays[0].dims, arrays[1].dims[-2]
        if kind == "dkv" and any(len(shape.dims) == len(arrays[0].dims) + 1 for shape in instruction.shapes):
            kind = "backward"  # it also makes dq, one for each tile of keys
        flops = MATMULS[kind] * 2.0 * arrays[0].size * keys
        filled = min(head / MATRIX_UNIT.get(self.chip.name, 128), 1.0)
        on_vectors = VECTOR_OPERATIONS[kind] * arrays[0].size / head * keys
        seconds = flops / (self.peak * filled) + on_vectors * self.chip.devices / self.chip.vector_operations
        return max(seconds, moved / self.bandwidth), "kernels", flops

    def _add(
        self, computation: Computation, instruction: Instruction, category: str, seconds: float, times: int, flops=0.0
    ) -> None:
        key = (computation.name, instruction.name)
        item = self.out.items.setdefault(key, Item(instruction.name, instruction.op_name, category))
        item.seconds += seconds * times
        item.flops += flops * times
        item.count += times
        self.out.flops += flops * times


def kernel_kind(name: str) -> str:
    """What an attention kernel computes, by the names of JAX's own (splash and flash attention)."""
    if "attention" not in name and "splash" not in name and "mha" not in name:
        return "other"
    for part, kind in (("dkv", "dkv"), ("dq", "dq"), ("bwd", "backward")):
        if part in name.split(" ")[0]:
            return kind
    return "forward"


def _chain(instruction: Instruction) -> str | None:
    found = re.search(r'chain_id="(\w+)"', instruction.attributes)
    return found.group(1) if found else None
