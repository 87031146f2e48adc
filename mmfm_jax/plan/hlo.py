"""The text of a compiled program (HLO) as data: computations, their instructions in schedule order, and what each does.

The grammar is that of `Compiled.as_text()`, XLA's hlo_parser.cc; only what an estimate needs is read.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}  # others end in their number of bits
_STARTS = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = ")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


@dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    layout: str = ""
    """Tiles and memory space, such as `T(8,128)(2,1)S(1)`; space 1 is on the chip (VMEM)."""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * _bits(self.dtype) / 8

    @property
    def padded_bytes(self) -> float:
        """What it takes in memory: the minor axes filled up to whole tiles."""
        tile = re.match(r"T\(([\d,]+)\)", self.layout)
        if tile is None or not self.minor_to_major:
            return self.bytes
        dims = [self.dims[axis] for axis in reversed(self.minor_to_major)]
        for i, size in enumerate(reversed(tile.group(1).split(",")), 1):
            if i <= len(dims):
                dims[-i] = -(-dims[-i] // int(size)) * int(size)
        return math.prod(dims) * _bits(self.dtype) / 8

    @property
    def on_chip(self) -> bool:
        return "S(1)" in self.layout


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result; several when it is a tuple."""
    operands: tuple[str, ...]
    arguments: str
    """The text between the parentheses: operands, or the value of a constant."""
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The text of `name=TEXT` up to the next comma or space, brackets kept whole."""
        found = re.search(rf"(?:^|[, ]){name}=({{[^{{}}]*}}|\"[^\"]*\"|[^,\s]+)", self.attributes)
        return found.group(1) if found else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs: of a fusion, call, loop or condition, not the scalar function of a reduction."""
        found = re.findall(r"\b(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)", self.attributes)
        if self.opcode in ("call", "async-start"):
            found += re.findall(r"\bto_apply=%?([\w.\-]+)", self.attributes)
        for several in re.findall(r"\b(?:branch_computations|called_computations)={([^}]*)}", self.attributes):
            found += re.findall(r"[\w.\-]+", several)
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def op_name(self) -> str:
        """Where it comes from in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's own estimate, where it gives one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else None

    @property
    def target(self) -> str:
        """Of a custom call: what is called."""
        return (self.attribute("custom_call_target") or "").strip('"')

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]
    """In the order they run, if the program is scheduled."""

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        return self.by_name.get(instruction.operands[index]) if index < len(instruction.operands) else None


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Every instruction of the computations that it runs, and of those that they run."""
        for name in instruction.called:
            for inner in self.computations[name].instructions:
                yield inner
                yield from self.inside(inner)

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """Turns of a while loop: as the compiler says, else from where its counter starts, steps and ends.

        1 when the end cannot be read; a start or a step that cannot be read is 0 or 1.
        """
        if known := re.search(r'"known_trip_count":{"n":"(\d+)"}', loop.attributes):
            return int(known.group(1))
        condition = self.computations.get((loop.attribute("condition") or "").lstrip("%"))
        body = self.computations.get((loop.attribute("body") or "").lstrip("%"))
        if condition is None or body is None:
            return 1
        compared = self._operands(condition, condition.root, "compare")
        end = next((value for value in map(_number, compared) if value is not None), None)
        counter = next((i for i in compared if i is not None and i.opcode == "get-tuple-element"), None)
        if end is None or counter is None:
            return 1
        index = int(counter.attribute("index") or 0)
        added = self._operands(body, body.operand(body.root, index), "add")
        step = next((value for value in map(_number, added) if value), 1)
        state = computation.operand(loop, 0)
        first = _number(_source(computation, computation.operand(state, index))) if state else None
        return max(-(-(end - (first or 0)) // step), 0)

    def _operands(self, computation: Computation, instruction: Instruction | None, opcode: str) -> list:
        """What an instruction of this opcode works on, also if it is all that a fusion does; none of any other."""
        if instruction is None:
            return []
        if instruction.opcode == opcode:
            return [_source(computation, computation.operand(instruction, i)) for i in range(2)]
        if instruction.opcode != "fusion":
            return []
        inner, found = self.computations[instruction.called[0]], []
        for value in self._operands(inner, inner.root, opcode):
            if value is not None and value.opcode == "parameter":
                value = _source(computation, computation.operand(instruction, int(value.arguments)))
            found.append(value)
        return found

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """Of one run of an instruction: its matrix products and convolutions, and those of what it runs once."""
        total = _matmul_flops(computation, instruction)
        for name in instruction.called:
            inner = self.computations[name]
            once = sum(self.flops(inner, i) for i in inner.instructions)
            total += once * (self.trip_count(computation, instruction) if instruction.opcode == "while" else 1)
        return total


def parse(text: str) -> Module:
    """A program from its text. Raises ValueError when it has no entry computation."""
    computations, entry, name = {}, None, ""
    lines: list[str] = []
    for line in text.splitlines():
        if line == "}":
            computations[name] = Computation(name, tuple(_instruction(held) for held in lines))
        elif line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY").strip().lstrip("%").split(" ")[0].split("(")[0]
            entry, lines = name if line.startswith("ENTRY") else entry, []
        elif _STARTS.match(line):
            lines.append(line)
        elif lines:  # the metadata of a kernel may hold line breaks
            lines[-1] += line
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation")
    return Module(computations, entry)


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays named in the text of a type."""
    found = []
    for dtype, dims, order, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Shape(dtype, sizes, tuple(int(axis) for axis in order.split(",") if axis), layout))
    return tuple(found)


def _source(computation: Computation, value: Instruction | None) -> Instruction | None:
    """Where a scalar comes from, before it was copied or converted."""
    while value is not None and value.opcode in ("bitcast", "copy", "convert", "reshape"):
        value = computation.operand(value, 0)
    return value


def _number(value: Instruction | None) -> int | None:
    """Of an integer constant."""
    whole = value is not None and value.opcode == "constant" and re.fullmatch(r"-?\d+", value.arguments)
    return int(value.arguments) if value is not None and whole else None


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opened = right.index("(", end)
    closed = _closing(right, opened)
    arguments = right[opened + 1 : closed]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=right[end:opened].strip(),
        shapes=shapes(right[:end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=right[closed + 1 :].lstrip(", "),
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, opened: int) -> int:
    """Where the parenthesis at `opened` closes."""
    depth = 0
    for place in re.finditer(r"[()]", text[opened:]):
        depth += 1 if place.group() == "(" else -1
        if depth == 0:
            return opened + place.start()
    return len(text) - 1


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn, s32, c64
    return int(digits.group(1)) if digits else 32


def _matmul_flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = computation.operand(instruction, 0), computation.operand(instruction, 1)
    if left is None or right is None:
        return 0.0
    out, lhs, rhs = instruction.shapes[0].dims, left.shapes[0].dims, right.shapes[0].dims
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        return 2.0 * math.prod(out) * math.prod(lhs[int(axis)] for axis in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    of_lhs, of_rhs, of_out = labels.groups()
    spatial = [label for label in of_out if label.isdigit()]
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")]
    groups = instruction.attribute("batch_group_count")
    for i, label in enumerate(spatial):
        sizes = (out[of_out.index(label)], rhs[of_rhs.index(label)], lhs[of_lhs.index(label)])
        total *= _taps(*sizes, *_window(instruction, i))
    return total / int(groups or 1)


def _window(instruction: Instruction, axis: int) -> tuple[int, int, int, int]:
    """Stride, padding before, and dilations of the input and of the kernel along a spatial axis."""
    found = re.search(r"window={([^}]*)}", instruction.attributes)
    fields = dict(field.split("=") for field in found.group(1).split()) if found else {}

    def of(name: str, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    before = int(of("pad", "0_0").split("_")[0])
    return int(of("stride", "1")), before, int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))


@functools.cache
def _taps(out: int, kernel: int, size: int, stride: int, before: int, dilated: int, spread: int) -> int:
    """Products along one spatial axis: pairs of an output and a tap of the kernel that meet a real input."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - before
    return int(((place >= 0) & (place <= (size - 1) * dilated) & (place % dilated == 0)).sum())
