"""`mmfm plan --sweep`: remat, batch sizes and mesh shapes tried one after another, each compiled for the pod."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.data.batch import InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel.mesh import AXES, make_mesh
from mmfm_jax.plan import plan as planning
from mmfm_jax.plan.chips import GIB, Pod
from mmfm_jax.plan.plan import Plan, make_plan
from mmfm_jax.plan.report import ESTIMATE

REMAT = ("none", "dots", "full")
STACKS = ("vision", "text", "fusion")  # whose remat is varied; the table's stack is small


def sweep(
    experiment: Experiment,
    pod: Pod,
    price: float | None,
    spec: InputSpec,
    voxels: dict[str, str] | None,
    limit: int,
    console: Console,
) -> list[Plan]:
    """Plans of at most `limit` variants, the fastest a study first and those that do not fit last.

    The configuration as it stands comes first. Raises UserError when not one is valid on the pod.
    """
    plans, refused = [], None
    tried = variants(experiment, pod)[: max(limit, 1)]
    for number, variant in enumerate(tried, 1):
        console.print(f"{number} of {len(tried)}: {describe(variant)}", soft_wrap=True)
        try:
            plans.append(make_plan(variant, pod, price, spec, voxels))
        except UserError as error:
            refused = error
            console.print(f"  {error}", soft_wrap=True)
    if not plans and refused is not None:
        raise refused
    return sorted(plans, key=lambda plan: (not plan.fits, -(plan.samples_per_second or 0)))


def variants(experiment: Experiment, pod: Pod) -> list[Experiment]:
    """The configuration itself, then those that differ in one thing, in two, and in all three."""
    own = experiment.model_copy(update={"mesh": MeshConfig(**make_mesh(experiment.mesh, pod.devices).shape)})
    found = {(0, 0): own}
    meshes = [own.mesh, *_meshes(len(pod.devices), pod.slices)]
    for mesh, remat, factor in itertools.product(meshes, (None, *REMAT), (1.0, 2.0, 0.5)):
        size = int(own.train.batch_size * factor)
        if size == 0 or size % (mesh.data * mesh.fsdp * own.train.accumulate):
            continue
        stacks = {name: getattr(own.model, name).model_copy(update={"remat": remat}) for name in STACKS if remat}
        changes = {
            "mesh": mesh,
            "model": own.model.model_copy(update=stacks),
            "train": own.train.model_copy(update={"batch_size": size}),
        }
        variant = own.model_copy(update=changes)
        if variant not in found.values():
            found[sum(change != getattr(own, name) for name, change in changes.items()), len(found)] = variant
    return [found[key] for key in sorted(found)]


def _meshes(devices: int, slices: int) -> list[MeshConfig]:
    """Parameters split over a slice, over 64, 16 and 4 devices, and over a slice with `tensor` 2."""
    found = [MeshConfig(data=slices, fsdp=devices // slices)]
    for fsdp in (64, 16, 4):
        if fsdp < devices // slices and devices % fsdp == 0:
            found.append(MeshConfig(data=devices // fsdp, fsdp=fsdp))
    if devices // slices >= 8:
        found.append(MeshConfig(data=slices, fsdp=devices // slices // 2, tensor=2))
    return found


def describe(experiment: Experiment) -> str:
    mesh, model = experiment.mesh, experiment.model
    remat = "/".join(getattr(model, name).remat for name in STACKS)
    sizes = [f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1] or ["one device"]
    return f"{' x '.join(sizes)}, remat {remat}, batch {experiment.train.batch_size:,}"


def as_json(plan: Plan) -> dict[str, Any]:
    remat = {name: getattr(plan.experiment.model, name).remat for name in STACKS}
    return planning.as_json(plan) | {"remat": remat}


def report(plans: list[Plan]) -> RenderableType:
    priced = any(plan.price is not None for plan in plans)
    table = Table(title=f"{plans[0].experiment.name} on {plans[0].pod.topology}, estimated, fastest a study first")
    table.add_column("mesh, remat of vision/text/fusion, batch")
    for name in ("GiB", "step", "MFU", "studies/s", "days", *(["USD"] if priced else [])):
        table.add_column(name, justify="right")
    for plan in plans:
        cells = [describe(plan.experiment), f"{plan.hbm_bytes / GIB:.1f}"]
        if plan.fits and plan.step_seconds and plan.mfu is not None:
            cells += [f"{1e3 * plan.step_seconds:.0f} ms", f"{100 * plan.mfu:.1f}%"]
            cells += [f"{plan.samples_per_second:,.0f}", f"{plan.days:,.2f}"]
            cells += [f"{plan.price_usd:,.0f}"] if plan.price_usd is not None else []
        else:
            cells.append("does not fit")
        table.add_row(*cells)
    return Group(table, ESTIMATE)
