"""The `mmfm` command: one small function a verb. Heavy imports stay inside the verbs, so help answers at once."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmfm_jax.errors import UserError
from mmfm_jax.parallel.flags import set_flags, with_huge_pages
from mmfm_jax.screen import make_console, printable

if TYPE_CHECKING:
    from mmfm_jax.experiment import Experiment
    from mmfm_jax.train.stop import StopSignal

STARTED = time.perf_counter()

EXAMPLES = {
    "init": "mmfm init demo",
    "sample": "mmfm sample lidc --out data/lidc",
    "ingest": "mmfm ingest chest_ct.yaml --out data/chest",
    "rejects": "mmfm rejects data/chest chest_ct.yaml",
    "inspect": "mmfm inspect data/lidc",
    "train": "mmfm train demo.yaml --run runs/demo --train.steps 500",
    "evaluate": "mmfm evaluate runs/demo",
    "plan": "mmfm plan pod.yaml --topology v5e:16x16 --price 1.2 --train.batch_size 2048",
    "bench": "mmfm bench train vit-s --rounds 10, or: mmfm bench data ct-96",
    "schema": "mmfm schema > experiment.schema.json",
}


def init(args: argparse.Namespace) -> None:
    """Writes a commented experiment or description of a data set to start from; without a name, lists them."""
    from mmfm_jax.config.examples import listing, write_example

    print(listing() if args.name is None else write_example(args.name, args.out))


def sample(args: argparse.Namespace) -> None:
    """Builds a built-in store of real data. A store that is there already is left as it is."""
    if args.name == "lidc":
        from mmfm_jax.data.samples.lidc import build_lidc

        build_lidc(args.out, args.split_key)
    elif args.name == "idc":
        from mmfm_jax.data.samples.idc import build_idc

        build_idc(args.out, args.split_key)
    else:
        from mmfm_jax.data.samples.mni152 import build_mni152

        build_mni152(args.out, args.split_key)


def ingest(args: argparse.Namespace) -> None:
    """Turns raw exports (DICOM, NIfTI, PNG, tables, FHIR, MEDS, reports) into a de-identified store, as described.

    Every input ends in the store or in its rejects.parquet; exit status 3 says that some were refused.
    """
    from mmfm_jax.data.ingest.pool import Limits
    from mmfm_jax.data.ingest.report import held, summary
    from mmfm_jax.data.ingest.run import ingest
    from mmfm_jax.data.store.study_store import StudyStore

    ray = args.runner == "ray"
    workers = args.workers or (0 if ray else os.cpu_count() or 1)
    limits = Limits(workers, int(args.memory * 2**30), args.timeout)
    console = make_console(stderr=True)
    outcome = ingest(args.dataset, args.out, limits, append=args.append, work=args.work, ray=ray, console=console)
    make_console().print(summary(outcome))
    print(printable(held(outcome, StudyStore.open(args.out))))
    if outcome.rejects:
        sys.stdout.flush()
        sys.exit(3)


def rejects(args: argparse.Namespace) -> None:
    """Names the files that ingest refused, with reason and mend; needs the key and the files, and prints paths."""
    from mmfm_jax.data.ingest.report import named

    for line in named(args.store, args.dataset):
        print(line)


def inspect(args: argparse.Namespace) -> None:
    """Says what a store holds, and draws it in inspect.html; --verify also compares every file with its checksum.

    The page lies in the store's folder, or in the working directory where that is none or may not be written.
    """
    from mmfm_jax.data.inspect.summary import summary
    from mmfm_jax.data.store.study_store import StudyStore
    from mmfm_jax.extras import check_installed

    store = StudyStore.open(args.store)
    if args.verify:
        store.verify()
    make_console().print(summary(store))
    check_installed("the page of inspect", ["matplotlib"], "evaluate")
    from mmfm_jax.data.inspect.page import write_page

    print(f"\n{printable(str(write_page(store, args.out)))}")


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """Trains a configuration into a run folder; a run that holds a checkpoint goes on from it by itself."""
    from mmfm_jax.experiment import load_experiment
    from mmfm_jax.train.place import checked

    experiment = load_experiment(args.config, overrides)
    if args.run is None:
        raise UserError("train: give the folder of the run, such as --run runs/demo; it is made if it is not there")
    checked(args.run)

    from mmfm_jax.data.store.mix import check_there

    check_there(experiment.data)

    from mmfm_jax.train.stop import StopSignal, leave

    with StopSignal(leave) as stopping:
        _train(args, experiment, stopping)


def _train(args: argparse.Namespace, experiment: Experiment, stopping: StopSignal) -> None:
    import jax

    from mmfm_jax.parallel.compiled import keep_compiled
    from mmfm_jax.parallel.processes import start_processes
    from mmfm_jax.train.clock import Clock
    from mmfm_jax.train.loop import train
    from mmfm_jax.train.stop import tell_launcher

    def tell_place() -> None:
        if place and jax.process_index() == 0:
            console.print(f"Compiled programs are kept in {place}.", soft_wrap=True, highlight=False)

    clock, console = Clock(STARTED, before={"compile": tell_place}), make_console()
    with clock("devices"):
        start_processes()
        place = keep_compiled()
    outcome = train(experiment, args.run, console, clock, stopping)
    tell_launcher("stopped" if outcome.stopped else "finished")


def evaluate(args: argparse.Namespace) -> None:
    """Measures a run on held-out patients; writes evaluation.json and report.html into it."""
    from mmfm_jax.extras import check_installed
    from mmfm_jax.train.place import CONFIG, check_run

    check_installed("evaluate", ["matplotlib", "sklearn"], "evaluate")
    check_run(args.run)

    from mmfm_jax.data.store.format import local_folder
    from mmfm_jax.data.store.mix import check_there
    from mmfm_jax.experiment import load_experiment

    data = load_experiment(args.run / CONFIG).data
    if args.remote or all(local_folder(place) is not None for place in data.places):
        check_there(data)

    from mmfm_jax.evaluate.evaluate import evaluate

    evaluate(args.run, remote=args.remote)


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
    """Says what a run on a TPU pod will need and take, by compiling its step for it; none need be there.

    --measure instead times the step on the devices of this machine, on random data.
    """
    from mmfm_jax.experiment import load_experiment

    experiment = load_experiment(args.config, overrides)
    if not args.measure:
        from mmfm_jax.plan.chips import check_pod

        if args.topology is None:
            raise UserError("plan: give the pod to compile for, such as --topology v5e:16x16, or --measure")
        check_pod(args.topology, args.slices)
        from mmfm_jax.plan.environment import compile_without_devices

        compile_without_devices()
    from mmfm_jax.plan.command import run

    run(args, experiment)


def bench(args: argparse.Namespace, overrides: list[str]) -> None:
    """Times our training step against PyTorch's transformers, or our input pipeline against TensorStore and MONAI.

    train: same model, batch and device; the other side is SigLIP with PyTorch's AdamW, on a GPU compiled, in bfloat16
    and with PyTorch's own kernels of attention. data: random crops, against plain TensorStore reads of the same crops
    and against MONAI on the same volumes as .nii.gz.
    """
    if args.config and Path(args.config).is_file():  # its mistakes are told before what is slow is imported
        from mmfm_jax.experiment import load_experiment

        load_experiment(args.config, overrides)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other side needs memory too
    if args.what == "train":
        from mmfm_jax.bench.train import run
    else:
        from mmfm_jax.bench.data import run

    run(args, overrides)


def schema(args: argparse.Namespace) -> None:
    """Prints the JSON schema of a configuration, or of a data set to ingest, for editors; or its fields as a page."""
    import json

    if args.of == "dataset":
        from mmfm_jax.data.ingest.dataset import Dataset as described
    else:
        from mmfm_jax.experiment import experiment_type

        described = experiment_type()
    if args.markdown:
        from mmfm_jax.config.markdown import markdown

        title = "Fields of a description of a data set" if args.of == "dataset" else "Fields of an experiment"
        print(markdown(title, f"mmfm schema {args.of} --markdown", described.model_json_schema()))
    else:
        print(json.dumps(described.model_json_schema(), indent=1))


FIELDS = """Any field can be set, after CONFIG: --train.steps 500, --train.steps=500, --inputs.images.ct.size 32 64 64.
NAME is a name of yours, N a place in a list from 0; a value is YAML; of a field that is set twice the last counts."""
TAKE_FIELDS = ("train", "plan", "bench")


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one sentence, and in the help of a verb that takes fields of a configuration, all of them."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.partition(" ")[2]
        raise UserError(f"{f'{verb}: ' if verb else ''}{message}; `{self.prog} --help` tells more")

    def print_help(self, file: Any = None) -> None:
        super().print_help(file)
        if self.prog.rpartition(" ")[2] in TAKE_FIELDS:
            from mmfm_jax.config.fields import listing
            from mmfm_jax.experiment import experiment_type

            print(f"\n{FIELDS}\n{listing(experiment_type())}", file=file)


class Version(argparse.Action):
    """Prints the versions that a report of a fault needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        import platform
        from importlib.metadata import version

        from mmfm_jax import __version__

        print(f"mmfm_jax {__version__}, jax {version('jax')}, python {platform.python_version()}")
        parser.exit()


def parser() -> Parser:
    top = Parser(
        allow_abbrev=False,
        prog="mmfm",
        description="Trains multimodal foundation models on medical images, texts and tables.",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=Version, nargs=0, help="print versions: of mmfm_jax, jax and python")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function) -> argparse.ArgumentParser:
        name, help = function.__name__, function.__doc__
        example = f"example: {EXAMPLES[name]}" if name in EXAMPLES else None
        said = help.split(". ")[0].rstrip(".")
        added = verbs.add_parser(name, help=said, description=help, epilog=example, allow_abbrev=False)
        added.set_defaults(function=function)
        return added

    of_init = verb(init)
    of_init.add_argument("name", nargs="?", help="demo, chest_ct or another of those that are listed without a name")
    of_init.add_argument("--out", type=Path, metavar="FILE", help="where it goes (NAME.yaml in the working directory)")
    of_sample = verb(sample)
    of_sample.add_argument(
        "name",
        choices=["lidc", "mni152", "idc"],
        help="lidc: nodules of chest CT as radiologists outlined and rated them; mni152: blocks of a brain template "
        "with masks of its tissues; idc: a million series of the Imaging Data Commons, texts and tables without images",
    )
    of_sample.add_argument("--out", required=True, help="folder or TensorStore URL of the store to build")
    of_sample.add_argument("--split-key", default="mmfm", help="key of the hash that deals patients to splits")
    of_ingest = verb(ingest)
    of_ingest.add_argument("dataset", type=Path, help="description of the data set in YAML; `mmfm init` lists examples")
    of_ingest.add_argument("--out", required=True, help="folder or TensorStore URL of the store to build")
    of_ingest.add_argument("--append", action="store_true", help="add new inputs to a store that is there")
    of_ingest.add_argument(
        "--runner", choices=["local", "ray"], default="local", help="read on this machine, or on a running Ray cluster"
    )
    of_ingest.add_argument("--workers", type=_positive(int), help="processes that read (one a core)")
    of_ingest.add_argument("--memory", type=_positive(float), default=4.0, metavar="GIB", help="for each worker (4)")
    of_ingest.add_argument("--timeout", type=_positive(float), default=600.0, metavar="S", help="for one series (600)")
    of_ingest.add_argument("--work", type=Path, help="folder for converted images until the store is whole")
    of_rejects = verb(rejects)
    of_rejects.add_argument("store", help="folder or TensorStore URL of a store that ingest built")
    of_rejects.add_argument("dataset", type=Path, help="the description that it was built from")
    of_inspect = verb(inspect)
    of_inspect.add_argument("store", help="folder or TensorStore URL of a store")
    of_inspect.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (inspect.html in the store)")
    of_inspect.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    of_train = verb(train)
    of_train.add_argument(
        "config", type=Path, help="experiment in YAML; any of its fields can be set as --field.name VALUE"
    )
    of_train.add_argument("--run", type=Path, help="folder of the run, which must be given; made if it is not there")
    of_evaluate = verb(evaluate)
    of_evaluate.add_argument("run", type=Path, help="folder of a run")
    of_evaluate.add_argument(
        "--remote", action="store_true", help="read studies that are not on this machine, where the run says so"
    )
    of_plan = verb(plan)
    of_plan.add_argument(
        "config", type=Path, help="experiment in YAML; any of its fields can be set as --field.name VALUE"
    )
    of_plan.add_argument("--topology", help="chips of one slice, such as v5e:16x16, v5p:4x4x4, v6e:16x16")
    of_plan.add_argument("--slices", type=int, default=1, help="slices, joined by the network; mesh.data crosses them")
    of_plan.add_argument("--price", type=_positive(float), help="USD of one chip for an hour, to price the run")
    of_plan.add_argument("--store", action="store_true", help="read shapes from the store instead of assuming them")
    of_plan.add_argument("--sweep", action="store_true", help="try remat, batch sizes and meshes; the best as a table")
    of_plan.add_argument(
        "--sweep-limit", type=_positive(int), default=12, metavar="N", help="compile at most N of them (12)"
    )
    of_plan.add_argument("--measure", action="store_true", help="time the step on the devices of this machine")
    for flag, metavar, of in (
        ("--host-cores", "N", "cores of a host that may read (its vCPUs as published)"),
        ("--host-gbps", "N", "Gbit/s into a host (as published)"),
        ("--host-memory", "GB", "of a host (as published)"),
        ("--bucket-gbps", "N", "Gbit/s that the bucket gives to all hosts together (200)"),
        ("--bucket-requests", "N", "reads a second that the bucket takes at most (no end, doubling every 20 minutes)"),
        ("--request-price", "USD", "of 1,000 reads (0.0004)"),
        ("--crop-ms", "MS", "of a core for a crop, as mmfm bench data prints it (1.5 a decoded MB)"),
    ):
        of_plan.add_argument(flag, type=_positive(float), metavar=metavar, help=of)
    of_plan.add_argument("--json", action="store_true", help="print data instead of tables")
    of_schema = verb(schema)
    of_schema.add_argument("of", nargs="?", choices=["experiment", "dataset"], default="experiment")
    of_schema.add_argument("--markdown", action="store_true", help="print every field and what it means, to read")
    of_bench = verb(bench)
    of_bench.add_argument(
        "what", choices=["train", "data"], help="train: forward, backward and update; data: reading training batches"
    )
    of_bench.add_argument(
        "config",
        nargs="?",
        help="vit-s, vit-b, vit-l, vit-l-3d, for data ct-96, or an experiment in YAML; any of its fields can be set as "
        "--field.name VALUE (by default what suits the device: vit-s on the CPU, the others on a GPU; for data ct-96)",
    )
    of_bench.add_argument("--rounds", type=_positive(int), default=10, help="turns that each side has (10)")
    of_bench.add_argument("--json", action="store_true", help="print data instead of tables")
    return top


def _positive(kind):
    def positive(text: str):
        try:
            value = kind(text)
        except ValueError as error:
            said = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {said}; give {said} above 0") from error
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
        return value

    return positive


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a verb, and the words that set fields of its configuration: those after an option of no verb's."""
    top = parser()
    verbs = next(action.choices for action in top._actions if isinstance(action.choices, dict))
    name = words[0] if words else ""
    if name and not name.startswith("-") and name not in verbs:
        near = difflib.get_close_matches(name, verbs, 1)
        raise UserError(f"{name}: is no verb; {f'did you mean {near[0]}?' if near else '`mmfm --help` lists them'}")
    if name not in TAKE_FIELDS:
        return top.parse_args(words), []
    options = verbs[name]._option_string_actions
    own, fields = [], []
    place = own
    for word in words:
        if word.startswith("--"):
            place = own if word.partition("=")[0] in options else fields
            if place is fields:
                _check_option(word, options)
        (own if word == "-h" else place).append(word)
    return top.parse_args(own), fields


def _check_option(word: str, options: Iterable[str]) -> None:
    """Raises UserError for a misspelt option of a verb, which is no field."""
    near = difflib.get_close_matches(word.partition("=")[0], options, 1, 0.8)
    if near and "." not in word.partition("=")[0]:
        raise UserError(f"{word}: is no option; did you mean {near[0]}?")


def main(arguments: list[str] | None = None) -> None:
    set_flags()
    try:
        args, fields = parse(sys.argv[1:] if arguments is None else arguments)
        if arguments is None and args.verb in ("train", "evaluate", "bench") and (environment := with_huge_pages()):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
        args.function(args, fields) if args.verb in TAKE_FIELDS else args.function(args)
    except UserError as error:
        _fail(str(error))
    except MemoryError:
        _fail("this machine's memory is too small for this; make train.batch_size, inputs or model smaller")
    except KeyboardInterrupt:
        print("mmfm: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(sentence: str) -> NoReturn:
    print(f"mmfm: {printable(sentence)}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


if __name__ == "__main__":
    main()
