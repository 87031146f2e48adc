"""What one GPU does, as markdown rows for docs/performance.md and as JSON, in ten minutes and without a network.

Run by `make gpu PYTHON=python3 WHEELS=folder`. Each part is a process of its own with a time limit; one that fails or
takes too long is a row that says so. Wheels in the folder are added to what PYTHON has (JAX with CUDA, PyTorch and
transformers), without their dependencies. `--tiny` has sizes for a CPU, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
TINY = {"width": 32, "depth": 1, "heads": 2}


def experiment(name: str, tiny: bool, **changed: Any):
    """One of the models that are timed, `changed` by section; small in all if `tiny`."""
    from mmfm_jax.bench.models import builtin
    from mmfm_jax.experiment import validate

    raw = builtin(name).model_dump(mode="json")
    image = raw["inputs"]["images"]["image"]
    if tiny:
        image["size"] = [p * 2 for p in image["patch"]]
        raw["inputs"]["texts"]["report"]["length"] = 8
        raw["data"]["vocabulary_size"] = 512
        raw["model"] |= {"vision": {**TINY, "registers": 0}, "text": TINY, "dtype": "float32"}
        raw["tasks"]["image_text"]["width"] = TINY["width"]
        raw["train"]["batch_size"] = 2
    for section, values in changed.items():
        raw[section] |= values
    return validate(raw, name)


def against_torch(name: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Our step and that of PyTorch's transformers under torch.compile, in turns."""
    import jax

    from mmfm_jax.bench.train import as_json, compare
    from mmfm_jax.train.flops import peak_flops

    found = as_json(compare(experiment(name, tiny), jax.default_backend(), 1 if tiny else 4))
    ours, theirs = found["sides"].values()
    published = peak_flops(jax.devices()[0]) or found["matmul_peak_flops"]
    for whose, side in (("step", ours), ("step of transformers, torch.compile", theirs)):
        mfu = side["model_flops"] / side["step_seconds"] / published
        yield {
            "what": f"`{name}`, {whose}",
            "figure": f"{1e3 * side['step_seconds']:.1f} ms, {side['samples_per_second']:.1f} studies/s, MFU {mfu:.1%}",
            "data": side,
        }
    yield {"what": f"`{name}`, ours beside it", "figure": f"{found['ratio']:.2f} times as fast", "data": found}


def attention_kernels(tiny: bool) -> Iterator[dict[str, Any]]:
    """Forward and backward of one attention, as cuDNN and as XLA do it."""
    import jax
    import jax.numpy as jnp

    from mmfm_jax.model.attention import Implementation, attention

    on_gpu = jax.default_backend() == "gpu"
    shape = (1, 64, 2, 16) if tiny else (8, 1728, 16, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16 if on_gpu else jnp.float32) for key in keys)
    took = {}
    pair: tuple[Implementation, Implementation] = ("cudnn", "xla") if on_gpu else ("xla", "blocks")
    for implementation in pair:

        def total(q, k, v, implementation: Implementation = implementation):
            return attention(q, k, v, implementation=implementation).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        jax.block_until_ready(step(q, k, v))
        times = []
        for _ in range(3 if tiny else 30):
            started = time.perf_counter()
            jax.block_until_ready(step(q, k, v))
            times.append(time.perf_counter() - started)
        took[implementation] = median(times)
        figure = f"{1e3 * took[implementation]:.3f} ms forward and backward"
        yield {"what": f"attention {'x'.join(map(str, shape))}, {implementation}", "figure": figure, "data": times}
    first, second = took
    ratio = took[second] / took[first]
    yield {"what": f"attention, {first} beside {second}", "figure": f"{ratio:.2f} times as fast", "data": took}


def data_stall(tiny: bool) -> Iterator[dict[str, Any]]:
    """`mmfm train` of vit-l-3d on synthetic CT volumes: the share of a step that waits for data."""
    from mmfm_jax.bench.volumes import SCHEMA, ct_studies
    from mmfm_jax.data.store.writer import write_store
    from mmfm_jax.screen import make_console
    from mmfm_jax.train.loop import train

    splits = ["train"] * (3 if tiny else 10) + ["validation", "test"]
    steps = 4 if tiny else 60
    with tempfile.TemporaryDirectory() as folder:
        write_store(f"{folder}/store", SCHEMA, ct_studies([40 if tiny else 240] * len(splits), splits))
        config = experiment(
            "vit-l-3d", tiny,
            data={"store": f"{folder}/store", "vocabulary_size": 512, "reader_threads": len(os.sched_getaffinity(0))},
            train={"steps": steps, "log_every": 2 if tiny else 10, "validate_every": steps, "validate_batches": 1},
            checkpoint={"every": steps, "best": None},
        )  # fmt: skip
        train(config, Path(folder) / "run", make_console(quiet=True))
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait"] for line in lines if "data_wait" in line]
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    figure = f"{median(waits[1:] or waits):.1%} of the time waiting, {median(rates[1:] or rates):.1f} studies/s"
    yield {"what": f"`vit-l-3d` trained from a store, {steps} steps", "figure": figure, "data": lines}


def longest_volume(tiny: bool) -> Iterator[dict[str, Any]]:
    """Twice the slices until the step does not fit: ViT-L, one volume, everything recomputed."""
    from mmfm_jax.bench.ours import Ours

    slices, patch, largest, tried = (16 if tiny else 128), 8, None, []
    while not tiny or slices <= 32:
        inputs = {"images": {"image": {"size": [slices, *((32, 32) if tiny else (512, 512))], "patch": [patch, 16, 16],
                                       "window": [-1000, 1000]}}}  # fmt: skip
        config = experiment("vit-l-3d", tiny, inputs=inputs, train={"batch_size": 1})
        vision = config.model.vision.model_copy(update={"remat": "full"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"vision": vision})})
        try:
            side = Ours(config)
            started = time.perf_counter()
            side.step(1)
        except Exception as error:  # what runs out of memory is no class of its own
            tried.append({"slices": slices, "ended": type(error).__name__})
            break
        tokens = slices // patch * (4 if tiny else 1024)
        tried.append({"slices": slices, "tokens": tokens, "seconds": time.perf_counter() - started})
        largest = tried[-1]
        print(json.dumps({"what": "longest volume so far", "figure": f"{tokens:,} tokens", "data": tried}), flush=True)
        slices *= 2
    if largest is None:
        raise RuntimeError(f"not even {slices} slices ran")
    figure = f"{largest['slices']} slices, {largest['tokens']:,} tokens, {largest['seconds']:.1f} s a step"
    yield {"what": "longest volume of one GPU, ViT-L", "figure": figure, "data": tried}


PARTS: dict[str, tuple[Callable[[bool], Iterator[dict[str, Any]]], float]] = {  # and the seconds that each may take
    "vit-l": (lambda tiny: against_torch("vit-l", tiny), 150),
    "vit-l-3d": (lambda tiny: against_torch("vit-l-3d", tiny), 150),
    "attention": (attention_kernels, 50),
    "data": (data_stall, 110),
    "longest": (longest_volume, 110),
}


def run(part: str, options: argparse.Namespace, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of a part; what it had found when it failed or its time was up, and a row that says so."""
    command = [sys.executable, __file__, "--part", part, *(["--tiny"] if options.tiny else [])]
    limit = options.seconds or PARTS[part][1]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, cwd=ROOT)
        out, ended = (
            done.stdout,
            done.returncode and f"failed: {([*done.stderr.strip().splitlines()] or [''])[-1][:200]}",
        )
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        ended = f"stopped after {limit:g} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"what"')]
    if len(rows) > 1:
        rows = [row for row in rows if not row["what"].endswith("so far")] or rows[-1:]
    return [*rows, *([{"what": part, "figure": ended, "data": None}] if ended else [])]


def machine(environment: dict[str, str]) -> str:
    """Device and versions, as the table's heading has them."""
    asked = (
        "import jax, platform; d = jax.devices()[0]; "
        "print(d.device_kind, '| jax', jax.__version__, '| Python', platform.python_version())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, env=environment
        )
    except subprocess.TimeoutExpired:
        return "a device that does not answer"
    return done.stdout.strip() or "no device: " + done.stderr.strip()[-200:]


def with_wheels(folder: Path | None, target: str) -> dict[str, str]:
    """The environment of the parts, in which the wheels are installed."""
    paths = [str(ROOT)]
    if folder is not None and (wheels := sorted(map(str, folder.glob("*.whl")))):
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, *wheels]
        subprocess.run(install, check=True)
        paths.append(target)
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*paths, *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--wheels", type=Path, help="folder of wheels to add to what this Python has")
    options.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    options.add_argument("--seconds", type=float, help="that each part may take, instead of its own limit")
    options.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the data goes (gpu.json)")
    options.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    options.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.part:
        for row in PARTS[given.part][0](given.tiny):
            print(json.dumps(row, default=str), flush=True)
        return
    if unknown := set(given.parts.split(",")) - set(PARTS):
        options.error(f"--parts {','.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as target:
        environment = with_wheels(given.wheels, target)
        where, found, started = machine(environment), {}, time.perf_counter()
        print(f"{where}\n\n| what | figure |\n|---|---|", flush=True)
        for part in given.parts.split(","):
            found[part] = run(part, given, environment)
            for row in found[part]:
                print(f"| {row['what']} | {row['figure'].replace('|', '/')} |", flush=True)
            given.out.write_text(json.dumps({"machine": where, "parts": found}, indent=1))
    print(f"\n{time.perf_counter() - started:.0f} s; data in {given.out}")


if __name__ == "__main__":
    main()
