"""The `mmfm` command: one small function a verb. Heavy imports stay inside the verbs, so help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mmfm_jax.errors import UserError

EXAMPLES = {
    "sample": "mmfm sample lidc --out data/lidc",
    "inspect": "mmfm inspect data/lidc",
    "train": "mmfm train configs/demo.yaml --run runs/demo --train.steps 500",
    "evaluate": "mmfm evaluate runs/demo",
    "schema": "mmfm schema > configs/experiment.schema.json",
}


def sample(args: argparse.Namespace) -> None:
    """Builds a built-in store of real data. A store that is there already is left as it is."""
    from mmfm_jax.data.samples.lidc import build_lidc

    build_lidc(args.out, args.split_key)


def inspect(args: argparse.Namespace) -> None:
    """Says what a store holds; --verify also compares every file with its checksum."""
    from rich.console import Console

    from mmfm_jax.data.inspect import summary
    from mmfm_jax.data.store import StudyStore

    store = StudyStore.open(args.store)
    if args.verify:
        store.verify()
    Console().print(summary(store))


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """Trains a configuration into a run folder; a run that holds a checkpoint goes on from it by itself."""
    from mmfm_jax.parallel.processes import start_processes

    start_processes()
    from mmfm_jax.config import load_experiment
    from mmfm_jax.train.loop import train

    train(load_experiment(args.config, overrides), args.run)


def evaluate(args: argparse.Namespace) -> None:
    """Measures a run on held-out patients; writes evaluation.json and report.html into it."""
    from mmfm_jax.evaluate.evaluate import evaluate

    evaluate(args.run)


def schema(args: argparse.Namespace) -> None:
    """Prints the JSON schema of a configuration, for editors."""
    import json

    from mmfm_jax.config import experiment_type

    print(json.dumps(experiment_type().model_json_schema(), indent=1))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mmfm", description="Trains multimodal foundation models on medical images, texts and tables."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function) -> argparse.ArgumentParser:
        name, help = function.__name__, function.__doc__
        example = f"example: {EXAMPLES[name]}" if name in EXAMPLES else None
        added = verbs.add_parser(name, help=help.split(". ")[0].rstrip("."), description=help, epilog=example)
        added.set_defaults(function=function)
        return added

    of_sample = verb(sample)
    of_sample.add_argument(
        "name", choices=["lidc"], help="lidc: nodules of chest CT as radiologists outlined and rated them"
    )
    of_sample.add_argument("--out", required=True, help="folder or TensorStore URL of the store to build")
    of_sample.add_argument("--split-key", default="mmfm", help="key of the hash that deals patients to splits")
    of_inspect = verb(inspect)
    of_inspect.add_argument("store", help="folder or TensorStore URL of a store")
    of_inspect.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    of_train = verb(train)
    of_train.add_argument(
        "config", type=Path, help="experiment in YAML; any of its fields can be set as --field.name VALUE"
    )
    of_train.add_argument("--run", type=Path, required=True, help="folder of the run; made if it is not there")
    of_evaluate = verb(evaluate)
    of_evaluate.add_argument("run", type=Path, help="folder of a run")
    verb(schema)
    return top


def main(arguments: list[str] | None = None) -> None:
    args, rest = parser().parse_known_args(arguments)
    if rest and args.verb != "train":
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.function(args, rest) if args.verb == "train" else args.function(args)
    except UserError as error:
        print(f"mmfm: {error}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
