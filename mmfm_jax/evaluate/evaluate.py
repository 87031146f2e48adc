"""`mmfm evaluate RUN`: measures a finished run on the patients it was not trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table as RichTable

from mmfm_jax.config.evaluation import EvaluateConfig
from mmfm_jax.data.batch import InputSpec
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.pipeline import evaluation_batches
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.errors import UserError
from mmfm_jax.evaluate.features import Features, average_readings, collect, embed_prompts, extractor
from mmfm_jax.evaluate.metrics import Measure
from mmfm_jax.evaluate.protocols import (
    WHOLE_TABLE,
    Bootstrap,
    Predictions,
    baselines,
    linear_probes,
    make_table,
    predictions,
    retrieval,
    zero_shot,
)
from mmfm_jax.tasks.contrastive import Contrastive
from mmfm_jax.train import folder
from mmfm_jax.train.checkpoint import TrainedRun, load_run
from mmfm_jax.train.learner import Learner

TRAIN = "train"
TRAIN_STUDIES = 20_000  # of the training split that probes and baselines are fitted on, the first in the store


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of a run, for `evaluation.json` and the report."""

    measures: dict[str, Measure]
    """By name, such as `malignancy/fused/auroc`."""
    predictions: list[tuple[str, Predictions]]
    """By name of the label or of the zero-shot question, for the curves."""
    test: Features
    notes: tuple[str, ...]
    """What could not be measured, and why: one sentence each."""


def evaluate(run: str | Path, console: Console | None = None) -> Evaluation:
    """Measures the run in a folder; writes `evaluation.json` and `report.html` there and prints a table.

    Raises UserError when the run, its store or its split cannot be read, or the evaluation asks for what they lack.
    """
    from mmfm_jax.evaluate.report import write_report  # matplotlib takes a second to import

    if jax.process_count() > 1:
        raise UserError(
            "evaluation runs in one process (over all its devices); start `mmfm evaluate` on one host alone"
        )
    run, console = Path(run), console or Console()
    trained = load_run(run)
    data = trained.experiment.data
    store = open_data(data)
    samples = Samples(store, trained.experiment.inputs, trained.spec, trained.tokenizer)
    result = measure_run(trained, store, samples, console)
    measures = {name: asdict(measure) for name, measure in result.measures.items()}
    folder.replace(run / "evaluation.json", json.dumps(measures, indent=1) + "\n")
    write_report(run, trained, samples, result)
    for note in result.notes:
        console.print(note)
    console.print(results_table(result.measures))
    console.print(f"Report: {run / 'report.html'}", soft_wrap=True)
    return result


def measure_run(trained: TrainedRun, store: Studies, samples: Samples, console: Console) -> Evaluation:
    """Every protocol the run's tasks and configuration allow."""
    experiment, spec = trained.experiment, trained.spec
    config, bootstrap = experiment.evaluate, Bootstrap(experiment.evaluate.bootstrap, experiment.seed)
    check(config, spec, store, trained.learner)
    extract = extractor(trained.learner, spec)

    def features(split: str, limit: int | None = None) -> Features:
        devices = jax.local_device_count()
        batch_size = -(-config.batch_size // devices) * devices
        batches = evaluation_batches(samples, split, batch_size, np.arange(batch_size), limit)
        studies = len(store.rows(split)[:limit])
        progress = track(batches, f"{split} studies", -(-studies // batch_size), console=console, transient=True)
        return collect(extract, progress, store.patients)

    test, train = features(config.split), features(TRAIN, TRAIN_STUDIES)
    readings = [samples.readings(int(row)) for row in test.rows]
    test = average_readings(test, trained.learner, spec, trained.tokenizer, readings, config.batch_size)
    columns = tuple(dict.fromkeys([*experiment.inputs.columns, *(c for b in config.baselines.values() for c in b)]))
    test_table, train_table = (
        make_table([store.table(int(row))[1] for row in split.rows], columns, store.schema) for split in (test, train)
    )

    def baseline(label: str) -> dict:
        return baselines(
            train_table, train.labels[label], test_table,
            config.baselines, experiment.inputs.columns, len(spec.labels[label]), experiment.seed,
        )  # fmt: skip

    found: list[tuple[str, Predictions]] = []
    prompted = {asked.label for asked in config.zero_shot.values()}
    for label in test.heads or [label for label in spec.labels if label not in prompted]:
        probes = linear_probes(train, test, label, len(spec.labels[label]))
        scores = {**test.heads.get(label, {}), **probes, **baseline(label)}
        found.append((label, predictions(test, label, spec.labels[label], scores)))
    prompts = embed_questions(trained)
    for name, asked in config.zero_shot.items():
        positive, negative = np.split(prompts[name], [len(asked.positive)])
        image = test.embeddings[asked.task]["image"]
        scores = {"zero_shot": zero_shot(image, positive, negative)}
        if name not in test.heads:
            scores |= baseline(asked.label)
        found.append((name, predictions(test, asked.label, spec.labels[asked.label], scores, image.present)))
    measures, notes = {}, []
    for name, of_label in found:
        if of_label.measurable:
            measures |= {f"{name}/{key}": value for key, value in of_label.measures(bootstrap).items()}
        else:
            notes.append(
                f"{name} is left out: the {config.split} studies that carry it are not of two classes or more."
            )
    for task, sides in test.embeddings.items():
        first = next(other for other in test.embeddings if test.embeddings[other].keys() == sides.keys())
        place = "retrieval" if task == first else f"retrieval/{task}"  # a second task between the same two modalities
        measures |= {f"{place}/{key}": v for key, v in retrieval(test, task, config.recall_at, bootstrap).items()}
    return Evaluation(measures, [(name, p) for name, p in found if p.measurable], test, tuple(notes))


def embed_questions(trained: TrainedRun) -> dict[str, np.ndarray]:
    """The prompts of each zero-shot question, positive then negative, as unit vectors [prompt, width]."""
    questions = trained.experiment.evaluate.zero_shot
    found = {}
    for task in {asked.task for asked in questions.values()}:
        of_task = {name: asked.positive + asked.negative for name, asked in questions.items() if asked.task == task}
        together = tuple(prompt for prompts in of_task.values() for prompt in prompts)  # compiled once for all
        vectors = embed_prompts(trained.learner, trained.spec, trained.tokenizer, task, together)
        ends = np.cumsum([len(prompts) for prompts in of_task.values()])
        found |= dict(zip(of_task, np.split(vectors, ends[:-1])))
    return found


def check(config: EvaluateConfig, spec: InputSpec, store: Studies, learner: Learner) -> None:
    """Refuses an evaluation that asks for what the run or its store lacks, before anything is computed."""
    for name, columns in config.baselines.items():
        if name == WHOLE_TABLE:
            raise UserError(f"evaluate.baselines.{name}: is the name of the gradient boosting; give another name")
        for column in columns:
            if column not in store.schema.columns:
                held = ", ".join(store.schema.columns)
                raise UserError(f"evaluate.baselines.{name}: the store has no column {column}; it has {held}")
    for name, asked in config.zero_shot.items():
        field = f"evaluate.zero_shot.{name}"
        if len(spec.labels.get(asked.label, ())) != 2:
            pairs = ", ".join(label for label, classes in spec.labels.items() if len(classes) == 2)
            raise UserError(
                f"{field}.label: {asked.label} is not a label of two classes in the store; those are {pairs}"
            )
        if not (asked.positive and asked.negative):
            raise UserError(f"{field}: lacks prompts; give at least one positive and one negative")
        task = learner.tasks.get(asked.task)
        if not (isinstance(task, Contrastive) and set(task.config.between) == {"image", "text"}):
            raise UserError(f"{field}.task: {asked.task} is not a contrastive task of the run between image and text")


def results_table(measures: dict[str, Measure]) -> RichTable:
    """Measures side by side with their intervals; a chance level stands in the row of what it is the chance of."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="Held-out patients")
    table.add_column("measure", no_wrap=True)
    for column in ("value", "95% interval", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    of = ""
    for name, m in measures.items():
        if name.endswith("_chance"):
            continue
        if (label := name.partition("/")[0]) != of:
            table.add_section()
            of = label
        interval = f"{_short(m.low)} to {_short(m.high)}" if m.low is not None and m.high is not None else ""
        level = measures.get(f"{name}_chance")
        table.add_row(name, _short(m.value), interval, _short(level.value) if level else "")
    return table


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
