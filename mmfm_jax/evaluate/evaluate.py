"""`mmfm evaluate RUN`: measures a finished run on the patients it was not trained on."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table as RichTable

from mmfm_jax.config.evaluation import EvaluateConfig
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.pipeline import evaluation_batches
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.errors import UserError
from mmfm_jax.evaluate.pictures import middle_slice
from mmfm_jax.evaluate.report import write_report
from mmfm_jax.evaluate.splits import OfTexts, collect, extractor
from mmfm_jax.metrics.baselines import WHOLE_TABLE, baselines, linear_probes, make_table
from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.findings import Exhibit, Findings, Forest
from mmfm_jax.metrics.held_out import HeldOut, LogProbability, Split, View, Words, view_name
from mmfm_jax.metrics.label import tell
from mmfm_jax.metrics.statistics import Measure
from mmfm_jax.train import folder
from mmfm_jax.train.checkpoint import TrainedRun, load_run

TRAIN = "train"
TRAIN_STUDIES = 20_000  # of the training split that probes and baselines are fitted on, the first in the store


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of a run, for `evaluation.json` and the report."""

    findings: Findings
    test: Split

    @property
    def measures(self) -> dict[str, Measure]:
        """By name, such as `malignancy/fused/auroc`."""
        return self.findings.measures


def evaluate(run: str | Path, console: Console | None = None) -> Evaluation:
    """Measures the run in a folder; writes `evaluation.json` and `report.html` there and prints a table.

    Raises UserError when the run, its store or its split cannot be read, or the evaluation asks for what they lack.
    """
    if jax.process_count() > 1:
        raise UserError(
            "evaluation runs in one process (over all its devices); start `mmfm evaluate` on one host alone"
        )
    run, console = Path(run), console or Console()
    trained = load_run(run)
    store = open_data(trained.experiment.data)
    samples = Samples(store, trained.experiment.inputs, trained.spec, trained.tokenizer)
    result = measure_run(trained, store, samples, console)
    findings, experiment = result.findings, trained.experiment
    measures = {name: asdict(measure) for name, measure in findings.measures.items()}
    folder.replace(run / "evaluation.json", json.dumps(measures, indent=1) + "\n")
    facts = (
        f"Step {trained.step}. {len(result.test.rows)} studies of {len(np.unique(result.test.patients))} patients of "
        f"the {experiment.evaluate.split} split, none of whom was trained on. Intervals: 95%, from "
        f"{experiment.evaluate.bootstrap} resamples of patients. For research, not for clinical decisions."
    )
    write_report(run, experiment.name, facts, findings)
    for note in findings.notes:
        console.print(note)
    console.print(results_table(findings.measures))
    console.print(f"Report: {run / 'report.html'}", soft_wrap=True)
    return result


def measure_run(trained: TrainedRun, store: Studies, samples: Samples, console: Console) -> Evaluation:
    """What every task of the run says of its own, and probes of the labels where none of them learns any."""
    experiment, spec, learner = trained.experiment, trained.spec, trained.learner
    config = experiment.evaluate
    check(config, store)
    extract = extractor(learner, spec)

    def split(name: str, limit: int | None = None, ask: bool = True) -> Split:
        devices = jax.local_device_count()
        batch_size = -(-config.batch_size // devices) * devices
        batches = evaluation_batches(
            samples, name, batch_size, np.arange(batch_size), limit, workers=experiment.data.workers
        )
        studies = len(store.rows(name)[:limit])
        progress = track(batches, f"{name} studies", -(-studies // batch_size), console=console, transient=True)
        return collect(extract, progress, store.patients, ask)

    test = split(config.split)
    columns = tuple(dict.fromkeys([*experiment.inputs.columns, *(c for b in config.baselines.values() for c in b)]))

    @functools.cache
    def train() -> Split:
        return split(TRAIN, TRAIN_STUDIES, ask=False)

    @functools.cache
    def tables():
        rows = ([store.table(int(row))[1] for row in of.rows] for of in (test, train()))
        return [make_table(of, columns, store.schema) for of in rows]

    @functools.cache
    def fitted(label: str, denied: View) -> dict[str, LogProbability]:
        classes, (test_table, train_table) = len(spec.labels[label]), tables()
        return linear_probes(train(), test, label, classes, denied) | baselines(
            train_table, train().labels[label], test_table,
            config.baselines, experiment.inputs.columns, classes, experiment.seed,
        )  # fmt: skip

    @functools.cache
    def readings() -> list[list[Words]]:
        return [samples.readings(int(row)) for row in test.rows]

    bootstrap = Bootstrap(config.bootstrap, experiment.seed)
    texts = OfTexts(learner, spec, trained.tokenizer, config.batch_size)

    def seen_by(task: str) -> HeldOut:
        return HeldOut(
            test=test,
            predicted=test.predicted.get(task, {}),
            classes=spec.labels,
            bootstrap=bootstrap,
            seed=experiment.seed,
            split=config.split,
            recall_at=config.recall_at,
            max_gallery=config.max_gallery,
            fitted=fitted,
            of_texts=functools.partial(texts, task),
            tokens=texts.tokens,
            first_text=next(iter(spec.texts), ""),
            readings=readings,
            picture=functools.partial(middle_slice, samples),
        )

    found = [(name, learner.tasks[name].measure(seen_by(name))) for name in experiment.tasks]
    if not any(config.needs().labels for config in experiment.tasks.values()):
        rest = set(spec.labels) - {label for _, of in found for label in of.answered}
        found += [(label, probes(label, spec.label_texts, seen_by(label))) for label in sorted(rest)]
    return Evaluation(joined(found), test)


def probes(label: str, label_texts: dict[str, str], held_out: HeldOut) -> Findings:
    """Linear probes of a label that no task learns, blind to texts where it was read out of one."""
    denied = frozenset({"text"} if label in label_texts else ())
    fitted = held_out.fitted(label, denied)
    return tell(label, label, fitted, held_out, headline=view_name(denied, "linear_probe"))


def joined(found: list[tuple[str, Findings]]) -> Findings:
    """The findings of all tasks. A task that measures otherwise what has a name already has its own name in front."""
    measures: dict[str, Measure] = {}
    exhibits: list[Exhibit] = []
    for task, findings in found:
        taken = any(measures.get(name, measure) != measure for name, measure in findings.measures.items())
        front = f"{task}/" if taken else ""
        measures |= {front + name: measure for name, measure in findings.measures.items()}
        for exhibit in findings.exhibits:
            if isinstance(exhibit, Forest):
                exhibit = replace(exhibit, measures={front + name: m for name, m in exhibit.measures.items()})
            exhibits.append(exhibit)
    return Findings(
        measures,
        tuple(exhibits),
        tuple(dict.fromkeys(note for _, findings in found for note in findings.notes)),
        tuple(label for _, findings in found for label in findings.answered),
    )


def check(config: EvaluateConfig, store: Studies) -> None:
    """Refuses an evaluation that asks for what the store lacks, before anything is computed."""
    for name, columns in config.baselines.items():
        if name == WHOLE_TABLE:
            raise UserError(f"evaluate.baselines.{name}: is the name of the gradient boosting; give another name")
        for column in columns:
            if column not in store.schema.columns:
                held = ", ".join(store.schema.columns)
                raise UserError(f"evaluate.baselines.{name}: the store has no column {column}; it has {held}")


def results_table(measures: dict[str, Measure]) -> RichTable:
    """Measures side by side with their intervals; a chance level stands in the row of what it is the chance of."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="Held-out patients")
    table.add_column("measure", no_wrap=True)
    for column in ("value", "95% interval", "chance", "studies"):
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
        table.add_row(name, _short(m.value), interval, _short(level.value) if level else "", str(m.n))
    return table


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
