"""The verb `mmfm plan` once the environment is set: one plan, a sweep of plans, or a measurement."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from mmfm_jax.experiment import load_experiment
from mmfm_jax.plan import lower
from mmfm_jax.plan.chips import pod
from mmfm_jax.plan.plan import as_json, make_plan
from mmfm_jax.plan.report import report


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    experiment = load_experiment(args.config, overrides)
    spec, voxels = lower.spec_of_store(experiment) if args.store else (lower.assumed_spec(experiment), None)
    if args.measure:
        from mmfm_jax.plan import measure

        measured = measure.measure(experiment, spec, voxels)
        _print(args.json, measure.as_json(measured), lambda: measure.report(measured))
        return
    target = pod(args.topology, args.slices)
    if args.sweep:
        from mmfm_jax.plan import sweep

        plans = sweep.sweep(experiment, target, args.price, spec, voxels, args.sweep_limit, Console(stderr=True))
        _print(args.json, [sweep.as_json(plan) for plan in plans], lambda: sweep.report(plans))
        return
    plan = make_plan(experiment, target, args.price, spec, voxels)
    _print(args.json, as_json(plan), lambda: report(plan))


def _print(as_data: bool, data: Any, tables) -> None:
    if as_data:
        print(json.dumps(data, indent=1))
    else:
        Console().print(tables())
