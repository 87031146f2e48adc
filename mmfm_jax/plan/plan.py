"""`mmfm plan`: what a run on a pod will need and take, from compiling its step for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from mmfm_jax.data.batch import InputSpec
from mmfm_jax.experiment import Experiment
from mmfm_jax.model.parameter import kind_of
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import hlo, lower
from mmfm_jax.plan.chips import Chip, Pod
from mmfm_jax.plan.estimate import Estimate, estimate
from mmfm_jax.plan.links import Network
from mmfm_jax.plan.phases import Phase, unsaid
from mmfm_jax.train import groups
from mmfm_jax.train.flops import step_flops

SECONDS_A_DAY = 86400.0


@dataclass(frozen=True)
class Plan:
    """What is known of a step on a pod. Bytes are of one chip; `estimated` is None when the step does not fit."""

    experiment: Experiment
    pod: Pod
    mesh: dict[str, int]
    hbm: dict[str, float]
    """By what holds it; only what is certain when the step does not fit."""
    hbm_bytes: float
    parameters: int
    model_flops: float
    """Of a step, over all chips."""
    gradient_bytes: float
    """That enter a device when gradients of linear layers are summed over devices, in what they are summed in."""
    tokens: int
    """Of a study, before any is hidden: patches, text positions and columns."""
    estimated: Estimate | None
    price: float | None
    """USD of one chip and hour."""

    @property
    def fits(self) -> bool:
        return self.estimated is not None and self.hbm_bytes <= self.pod.chip.hbm_bytes

    @property
    def step_seconds(self) -> float | None:
        return self.estimated.seconds if self.estimated else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what all chips could do in the time of a step."""
        if not self.step_seconds:
            return None
        return self.model_flops / (self.step_seconds * self.pod.chips * self.pod.chip.peak_flops)

    @property
    def samples_per_second(self) -> float | None:
        return self.experiment.train.batch_size / self.step_seconds if self.step_seconds else None

    @property
    def days(self) -> float | None:
        """Of all steps, without validation, checkpoints and restarts."""
        return self.experiment.train.steps * self.step_seconds / SECONDS_A_DAY if self.step_seconds else None

    @property
    def price_usd(self) -> float | None:
        return None if self.price is None or self.days is None else self.days * 24 * self.pod.chips * self.price

    @property
    def helps(self) -> list[str]:
        """What would make it fit, the cheapest first."""
        config, shards = self.experiment, self.mesh["data"] * self.mesh["fsdp"]
        found = []
        stacks = {"vision": config.model.vision, "text": config.model.text, "fusion": config.model.fusion}
        if loose := [name for name, stack in stacks.items() if stack.remat != "full"]:
            found.append("remat full: " + " ".join(f"--model.{name}.remat full" for name in loose))
        a_shard = config.train.batch_size // config.train.accumulate // shards
        if a_shard > 1:
            found.append(f"more parts of a batch: --train.accumulate {2 * config.train.accumulate}")
            found.append(f"a smaller batch: --train.batch_size {config.train.batch_size // 2}")
        if self.mesh["data"] > self.pod.slices:
            found.append(f"more shards of the parameters: --mesh.data {self.pod.slices} --mesh.fsdp -1")
        return [*found, "more chips, or chips of more memory: --topology"]


def make_plan(
    experiment: Experiment,
    pod: Pod,
    price: float | None = None,
    spec: InputSpec | None = None,
    voxels: dict[str, str] | None = None,
    phase: Phase = unsaid,
) -> Plan:
    """Compiles the step for the pod and estimates it. Without `spec`, inputs are assumed (`lower.assumed_spec`).

    Raises UserError when experiment and pod do not fit together.
    """
    phase("shapes")
    mesh = make_mesh(experiment.mesh, pod.devices)
    program = lower.make_program(experiment, spec or lower.assumed_spec(experiment), mesh, voxels)
    state, many = program.state, pod.chip.devices
    hbm: dict[str, float] = {
        "parameters": lower.held(state.params),
        "optimizer": lower.held(state.optimizer),
        "average": lower.held(state.average),
        "batch": lower.held(program.batch),
    }
    estimated = None
    try:
        compiled = lower.compile_step(program, phase)
        phase("read")
        memory = lower.memory(compiled)
        hbm["activations, gradients and scratch"] = memory.temporaries
        hbm["program and rest"] = memory.total - sum(hbm.values())
        needed = memory.total
        estimated = estimate_step(compiled, pod.chip, mesh.devices.flat)
    except lower.DoesNotFit as error:
        needed = error.used
        hbm["activations, gradients and scratch, at least"] = error.used - sum(hbm.values())
    return Plan(
        experiment=experiment,
        pod=pod,
        mesh=dict(mesh.shape),
        hbm={name: float(count * many) for name, count in hbm.items()},
        hbm_bytes=float(needed * many),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        model_flops=step_flops(program.graph, experiment, program.spec, state, program.batch),
        gradient_bytes=gradient_bytes(program),
        tokens=tokens_of(program.spec),
        estimated=estimated,
        price=price,
    )


def estimate_step(compiled: jax.stages.Compiled, chip: Chip, devices: Any) -> Estimate:
    return estimate(hlo.parse(compiled.as_text() or ""), chip, Network(devices, chip))


def gradient_bytes(program: lower.Program) -> float:
    """Of a step on one device, by rings: shards are scattered over `fsdp`, then each is summed over its copies. Every
    accumulated part of a batch does so."""
    mesh, experiment = program.mesh.shape, program.experiment
    copies, total = mesh["data"] * mesh["sequence"], 0.0
    trained, _ = groups.split(program.state.params, experiment.optimizer.groups)
    for _, variable in nnx.to_flat_state(trained):
        if kind_of(variable) == "matrix":
            leaf = variable.get_value()
            shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
            split = mesh["fsdp"] if "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)) else 1
            summed = copies * mesh["fsdp"] // split
            total += shard * (split - 1) + 2 * shard * (summed - 1) / summed
    return total * (2 if narrow_gradients(experiment) else 4) * experiment.train.accumulate


def narrow_gradients(experiment: Experiment) -> bool:
    """Whether devices sum them in bfloat16."""
    return experiment.train.reduce_dtype == experiment.model.dtype == "bfloat16"


def tokens_of(spec: InputSpec) -> int:
    """Of a study that has every part."""
    patches = sum(
        image.pack.tokens // image.pack.studies if image.pack else math.prod(image.grid)
        for image in spec.images.values()
    )
    return patches + sum(spec.text_tokens.values()) + len(spec.numbers) + len(spec.categories)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in the plan as data; what cannot be known of a step that does not fit is null."""
    found = plan.estimated
    return {
        "estimate": True,
        "topology": plan.pod.topology,
        "slices": plan.pod.slices,
        "chips": plan.pod.chips,
        "mesh": plan.mesh,
        "jax": jax.__version__,
        "fits": plan.fits,
        "hbm_bytes": plan.hbm_bytes,
        "hbm_limit_bytes": plan.pod.chip.hbm_bytes,
        "hbm": plan.hbm,
        "helps": [] if plan.fits else plan.helps,
        "parameters": plan.parameters,
        "batch_size": plan.experiment.train.batch_size,
        "steps": plan.experiment.train.steps,
        "model_flops": plan.model_flops,
        "gradient_bytes": plan.gradient_bytes,
        "program_flops": found and found.flops * len(plan.pod.devices),
        "step_seconds": plan.step_seconds,
        "mfu": plan.mfu,
        "samples_per_second": plan.samples_per_second,
        "tokens_per_second": plan.samples_per_second and plan.samples_per_second * plan.tokens,
        "days": plan.days,
        "price_usd": plan.price_usd,
        "collective_bytes": found and {kind: dict(by_link) for kind, by_link in found.collective_bytes.items()},
        "collective_seconds": found and found.collective_seconds,
        "by_category": found and found.by_category,
        "largest": found
        and [
            {
                "name": item.name,
                "op_name": item.op_name,
                "category": item.category,
                "seconds": item.seconds,
                "count": item.count,
                "flops": item.flops,
            }
            for item in found.largest()
        ],
    }
