"""FLOPs of a step counted from the traced program, and the peaks they are held against."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmfm_jax.data.batch import Batch, InputSpec
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.experiment import Experiment
from mmfm_jax.model.attention import Attention
from mmfm_jax.model.transformer import Transformer
from mmfm_jax.parallel.mesh import AXES
from mmfm_jax.train import groups
from mmfm_jax.train.state import TrainState

PEAK_TFLOPS = {  # dense bf16, a chip, as the vendors publish them
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,  # of a device, which is half a chip
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
}

ONE_CPU = AbstractMesh(
    (1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES), abstract_device=AbstractDevice("cpu", None, "cpu")
)


def peak_flops(device: Any) -> float | None:
    """Published bf16 FLOP/s of a device; None for a CPU or an unknown kind."""
    peak = PEAK_TFLOPS.get(device.device_kind)
    return None if peak is None else peak * 1e12


def model_flops(function, *shapes) -> float:
    """FLOPs of the matrix products and convolutions of a function, scans times their length.

    Those that nothing comes of are not counted.
    """
    traced = jax.make_jaxpr(function)(*shapes).jaxpr
    return _count(dce_jaxpr(traced, [True] * len(traced.outvars))[0])


def step_flops(graph: nnx.GraphDef, experiment: Experiment, spec: InputSpec, state: TrainState, batch: Batch) -> float:
    """Model FLOPs of a training step of one global batch: of the losses and of their gradient by what is trained.

    Without frozen parameters these are 3 x forward less the gradients of what enters the first layers, which nobody
    asks for. A frozen parameter spares its own product of backward, and those of all before it if they are frozen too.
    Traced as for one CPU, with all scores of attention at once and nothing computed anew, so that the count does not
    depend on which kernel attends, on what backward keeps or on how the mesh splits the work.
    """

    def loss(trained, frozen, buffers, batch):
        learner = nnx.merge(graph, trained, frozen, buffers)
        for _, module in nnx.iter_modules(learner):
            if isinstance(module, Transformer):
                module.remat = "none"
            if isinstance(module, Attention):
                module.implementation = "xla"
        return learner.loss(prepare(batch, spec, None, None), jax.random.key(0), train=True)[0]

    split = groups.split(state.params, experiment.optimizer.groups)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (*split, state.buffers, batch))
    # JAX lets a mesh give way to one of another size only by way of none.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.sharding.use_abstract_mesh(ONE_CPU):
        return model_flops(jax.value_and_grad(loss), *shapes)


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
        total += max(inner, default=0.0) if name == "cond" else sum(inner) * _times(name, params)
    return total


def _times(name: str, params: dict) -> int:
    """How often an equation runs its program: turns of a scan; the grid of a kernel; shards of a shard_map, where
    devices that hold the same shard repeat one another's work and count once."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        split = {axis for names in params["in_specs"] for axis in jax.tree.leaves(tuple(names))}
        return math.prod(params["mesh"].shape[axis] for axis in split)
    return 1


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
