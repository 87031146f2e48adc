"""A plan as tables for the person who pays for it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmfm_jax.plan.chips import GIB
from mmfm_jax.plan.plan import Plan, narrow_gradients

ESTIMATE = (
    "Estimate: compiled for these chips and never run on one. Cycles are the compiler's, kernels are counted by their "
    "products and vector work, links at what is published; reading data, validation and checkpoints are not in it."
)


def report(plan: Plan) -> RenderableType:
    parts: list[RenderableType] = [_summary(plan), _memory(plan)]
    if plan.estimated is None:
        helps = "\n".join(f"  {n}. {what}" for n, what in enumerate(plan.helps, 1))
        return Group(*parts, f"It does not fit: {_excess(plan)}. What would help:\n{helps}")
    return Group(*parts, _categories(plan), _traffic(plan), _largest(plan), ESTIMATE)


def _excess(plan: Plan) -> str:
    limit = plan.pod.chip.hbm_bytes
    over = (plan.hbm_bytes - limit) / GIB
    return (
        f"a chip would need at least {plan.hbm_bytes / GIB:.2f} GiB, {over:.2f} more than the {limit / GIB:.2f} it has"
    )


def _summary(plan: Plan) -> Table:
    pod, config = plan.pod, plan.experiment
    where = pod.topology + (f" x {pod.slices} slices" if pod.slices > 1 else "")
    table = _table(f"{config.name} on {where}", ["what"], ["estimate" if plan.estimated else "known"])
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    rows = [
        ("chips", f"{pod.chips:,}"),
        ("mesh", mesh),
        ("parameters", f"{plan.parameters / 1e6:,.1f} million"),
        ("batch", f"{config.train.batch_size:,} studies of {plan.tokens:,} tokens"),
        ("model FLOPs of a step", f"{plan.model_flops:.3g}"),
        ("gradients summed over devices", _gradients(plan)),
        ("HBM of a chip", f"{plan.hbm_bytes / GIB:.2f} of {pod.chip.hbm_bytes / GIB:.2f} GiB"),
        ("fits", "yes" if plan.fits else "NO"),
    ]
    if plan.step_seconds and plan.samples_per_second and plan.days is not None and plan.mfu is not None:
        rows += [
            ("step", _time(plan.step_seconds)),
            ("model FLOPs utilisation", f"{100 * plan.mfu:.1f}%"),
            ("studies a second", f"{plan.samples_per_second:,.0f}"),
            ("tokens a second", f"{plan.samples_per_second * plan.tokens:,.0f}"),
            (f"{config.train.steps:,} steps", f"{plan.days:,.2f} days"),
        ]
    if plan.price_usd is not None:
        rows.append((f"at {plan.price:g} USD a chip and hour", f"{plan.price_usd:,.0f} USD"))
    for row in rows:
        table.add_row(*row)
    return table


def _gradients(plan: Plan) -> str:
    count, config = plan.gradient_bytes / 1e6, plan.experiment
    if narrow_gradients(config):
        return f"{count:,.0f} MB a device in bfloat16"
    saved = f"; {count / 2:,.0f} with train.reduce_dtype bfloat16" if count and config.model.dtype == "bfloat16" else ""
    return f"{count:,.0f} MB a device in float32{saved}"


def _memory(plan: Plan) -> Table:
    table = _table("HBM of a chip", ["held by"], ["GiB"])
    for name, count in plan.hbm.items():
        table.add_row(name, f"{count / GIB:.3f}")
    return table


def _categories(plan: Plan) -> Table:
    table = _table("Where the time of a step goes", ["what"], ["time", "share"])
    for name, seconds in plan.estimated.by_category.items() if plan.estimated else ():
        table.add_row(name, _time(seconds), _share(seconds, plan))
    return table


def _traffic(plan: Plan) -> Table:
    table = _table("What a device receives in a step", ["collective", "link"], ["MB"])
    for kind, by_link in plan.estimated.collective_bytes.items() if plan.estimated else ():
        for link, count in by_link.items():
            table.add_row(kind, link.upper(), f"{count / 1e6:,.1f}")
    return table


def _largest(plan: Plan) -> Table:
    table = _table("Ten largest", ["operation", "kind"], ["time", "share", "runs", "TFLOP/s"])
    for item in plan.estimated.largest() if plan.estimated else ():
        rate = f"{item.flops / item.seconds / 1e12:.0f}" if item.flops and item.seconds else ""
        what = f"{readable(item.op_name)} {item.name}" if item.op_name else item.name
        kind = item.category.removesuffix(" exposed").removesuffix("s")
        table.add_row(Text(what), kind, _time(item.seconds), _share(item.seconds, plan), str(item.count), rate)
    return table


def _table(title: str, words: list[str], numbers: list[str]) -> Table:
    table = Table(title=title)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _share(seconds: float, plan: Plan) -> str:
    return f"{100 * seconds / plan.step_seconds:.1f}%" if plan.step_seconds else ""


def readable(op_name: str) -> str:
    """An operation's path in the traced program, without what every path has."""
    way = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else "update"
    noise = {"while", "body", "closed_call", "jvp()", "vmap()", "pallas_call", ""}
    parts = [part for part in op_name.split("/")[1:] if part not in noise and not part.startswith("transpose(")]
    parts = ["recomputed" if part == "rematted_computation" else part for part in parts if part != "checkpoint"]
    return f"{way}: {'/'.join(dict.fromkeys(parts))}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1e3 * seconds:.2f} ms"
