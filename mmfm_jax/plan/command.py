"""The verb `mmfm plan` once the environment is set: one plan, a sweep of plans, or a measurement."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from rich.console import Group

from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import feed, feed_report, lower
from mmfm_jax.plan.chips import pod
from mmfm_jax.plan.hosts import supply
from mmfm_jax.plan.links import DCN
from mmfm_jax.plan.phases import Phases
from mmfm_jax.plan.plan import Plan, as_json, make_plan
from mmfm_jax.plan.report import report
from mmfm_jax.screen import make_console


def run(args: argparse.Namespace, experiment: Experiment) -> None:
    spec, voxels = lower.spec_of_store(experiment) if args.store else (lower.assumed_spec(experiment), None)
    if args.measure:
        from mmfm_jax.plan import measure

        measured = measure.measure(experiment, spec, voxels)
        _print(args.json, measure.as_json(measured), lambda: measure.report(measured))
        return
    target = pod(args.topology, args.slices)
    if args.sweep:
        from mmfm_jax.plan import sweep

        plans = sweep.sweep(experiment, target, args.price, spec, voxels, args.sweep_limit, make_console(stderr=True))
        _print(args.json, [sweep.as_json(plan) for plan in plans], lambda: sweep.report(plans))
        return
    with Phases(make_console(stderr=True)) as phases:
        plan = make_plan(experiment, target, args.price, spec, voxels, phases)
    if plan.step_seconds is None:
        _print(args.json, as_json(plan) | {"feed": None}, lambda: report(plan))
        return
    found, others = _feeding(args, experiment, spec, voxels, plan)
    fed = feed_report.as_json(found, others, not args.store)
    _print(
        args.json,
        as_json(plan) | {"feed": fed},
        lambda: Group(report(plan), feed_report.report(found, others, not args.store)),
    )


def _feeding(args, experiment: Experiment, spec, voxels, plan: Plan) -> tuple[feed.Feed, dict[str, feed.Feed]]:
    """What reading needs, as the studies are stored and as they might be."""
    store = None
    if args.store:
        from mmfm_jax.data.store.mix import open_data

        store = open_data(experiment.data)
    pod, roles = plan.pod, feed.stored_roles(experiment, spec, voxels, store)
    of_a_host = max(Counter(device.process_index for device in pod.devices).values())
    have = supply(
        pod.chip, of_a_host // pod.chip.devices, args.host_cores, args.host_gbps, args.host_memory,
        args.bucket_gbps, args.bucket_requests, args.request_price, args.crop_ms,
    )  # fmt: skip
    traffic = plan.estimated.collective_bytes.values() if plan.estimated else ()
    crossing = of_a_host * sum(by_link.get(DCN, 0.0) for by_link in traffic)
    known = (experiment, roles, make_mesh(experiment.mesh, pod.devices), plan.step_seconds or 0.0, have, crossing)
    return feed.feed(*known), feed.with_other_chunks(*known)


def _print(as_data: bool, data: Any, tables) -> None:
    if as_data:
        print(json.dumps(data, indent=1))
    else:
        make_console().print(tables())
