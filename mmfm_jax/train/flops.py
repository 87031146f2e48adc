"""FLOPs of a step counted from the traced program, and the peaks they are held against."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend import core

PEAK_TFLOPS = {  # dense bf16, a chip, as the vendors publish them
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
}


def peak_flops(device: Any) -> float | None:
    """Published bf16 FLOP/s of a device; None for a CPU or an unknown kind."""
    peak = PEAK_TFLOPS.get(device.device_kind)
    return None if peak is None else peak * 1e12


def model_flops(function, *shapes) -> float:
    """FLOPs of the matrix products and convolutions of a function, scans times their length.

    For training multiply that of the forward loss by 3, as is usual: backward has two products for each, and
    what is rematerialised does not count.
    """
    return _count(jax.make_jaxpr(function)(*shapes).jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
            channels_out = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(out) * math.prod(kernel) / channels_out
        inner = [_count(sub) for sub in _inner(params)]
        total += max(inner, default=0.0) if name == "cond" else sum(inner) * (params["length"] if name == "scan" else 1)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(params: dict) -> list[core.Jaxpr]:
    """The programs that an equation runs: of a call, a loop body, the branches of a condition."""
    found = []
    for value in params.values():
        for candidate in value if isinstance(value, (tuple, list)) else [value]:
            candidate = getattr(candidate, "jaxpr", candidate)
            if isinstance(candidate, core.Jaxpr):
                found.append(candidate)
    return found
