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
from rich.table import Table as RichTable

from mmfm_jax import files
from mmfm_jax.config.evaluation import EvaluateConfig
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.pipeline import evaluation_batches
from mmfm_jax.data.store.format import local_folder
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.errors import UserError
from mmfm_jax.evaluate.pictures import middle_slice
from mmfm_jax.evaluate.plain import drawn_rows, read_plain
from mmfm_jax.evaluate.report import write_report
from mmfm_jax.evaluate.splits import AllTexts, OfTexts, collect, extractor
from mmfm_jax.extras import check_installed
from mmfm_jax.metrics.baselines import RESERVED, baselines, linear_probes
from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.findings import Exhibit, Findings, Forest
from mmfm_jax.metrics.held_out import HeldOut, LogProbability, Split, View, Words, view_name
from mmfm_jax.metrics.label import UNTRAINED, tell
from mmfm_jax.metrics.origin import PROBE, origin
from mmfm_jax.metrics.statistics import Measure
from mmfm_jax.screen import counted, make_console, plain, printable
from mmfm_jax.train import folder
from mmfm_jax.train.checkpoint import TrainedRun, load_run
from mmfm_jax.train.state import initial_learner

TRAIN, VALIDATION = "train", "validation"
CONTEXTS = 1_000  # training studies whose texts prompts may stand in


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of a run, for `evaluation.json` and the report."""

    findings: Findings
    test: Split

    @property
    def measures(self) -> dict[str, Measure]:
        """By name, such as `malignancy/fused/auroc`."""
        return self.findings.measures


def evaluate(run: str | Path, console: Console | None = None, remote: bool = False) -> Evaluation:
    """Measures the run in a folder; writes `evaluation.json` and `report.html` there and prints a table.

    `remote`: the run's configuration may name a store that is not in a folder of this machine.
    Raises UserError when the run, its store or its split cannot be read, or the evaluation asks for what they lack.
    """
    if jax.process_count() > 1:
        raise UserError(
            "evaluation runs in one process (over all its devices); start `mmfm evaluate` on one host alone"
        )
    check_installed("evaluate", ["matplotlib", "sklearn"], "evaluate")
    run, console = Path(run), console or make_console()
    trained = load_run(run)
    for place in trained.experiment.data.places:
        if local_folder(place) is not None:
            continue
        if not remote:
            raise UserError(
                f"{run / folder.CONFIG}: its studies are at {place}, which is no folder of this machine; if you trust "
                "that place and who wrote the run, give --remote"
            )
        console.print(plain(f"Studies are read from {place}."), soft_wrap=True)
    store = open_data(trained.experiment.data)
    samples = Samples(store, trained.experiment.inputs, trained.spec, trained.tokenizer)
    result = measure_run(trained, store, samples, console)
    findings, experiment = result.findings, trained.experiment
    measures = {name: asdict(measure) for name, measure in findings.measures.items()}
    files.replace(run / "evaluation.json", json.dumps(measures, indent=1) + "\n")
    facts = (
        f"Step {trained.step}. {len(result.test.rows)} studies of {len(np.unique(result.test.patients))} patients of "
        f"the {experiment.evaluate.split} split, none of whom was trained on. Intervals: 95%, from "
        f"{experiment.evaluate.bootstrap} resamples of patients. For research, not for clinical decisions."
    )
    write_report(run, experiment.name, facts, findings)
    for note in (facts, *findings.notes):
        console.print(plain(note))
    console.print(results_table({name: m for name, m in findings.measures.items() if brief(name)}))
    for headline in findings.headlines:
        console.print(plain(headline))
    console.print(plain(f"Report: {run / 'report.html'}"), soft_wrap=True)
    return result


def measure_run(trained: TrainedRun, store: Studies, samples: Samples, console: Console) -> Evaluation:
    """What every task of the run says of its own, and probes of the labels where none of them learns any."""
    experiment, spec, learner = trained.experiment, trained.spec, trained.learner
    config = experiment.evaluate
    check(config, store)
    extract = extractor(learner, spec, initial_learner(experiment, spec) if config.untrained else None)

    def split(name: str, rows: np.ndarray, ask: bool = True) -> Split:
        devices = jax.local_device_count()
        batch_size = -(-config.batch_size // devices) * devices
        batches = evaluation_batches(
            samples, name, batch_size, np.arange(batch_size), workers=experiment.data.workers, studies=rows
        )
        further = AllTexts(samples.readings, spec, trained.tokenizer, config.max_texts) if spec.texts else None
        progress = counted(batches, f"{printable(name)} studies", console, -(-len(rows) // batch_size))
        return collect(extract, progress, store.patients, ask, further)

    test = split(config.split, store.rows(config.split))
    columns = tuple(dict.fromkeys([*experiment.inputs.columns, *(c for b in config.baselines.values() for c in b)]))

    @functools.cache
    def train() -> Split:
        return split(TRAIN, drawn_rows(store, TRAIN, config.fit_studies), ask=False)

    @functools.cache
    def validation() -> Split | None:
        if config.split == VALIDATION:
            return None
        try:
            held = drawn_rows(store, VALIDATION, config.fit_studies)
        except UserError:  # the store has no such split
            return None
        return split(VALIDATION, held)

    @functools.cache
    def plain():
        return read_plain(samples, columns, train(), test)

    @functools.cache
    def probed(label: str, of: str) -> dict[View, LogProbability]:
        on = (train().fused, test.fused) if of == PROBE else (train().untrained, test.untrained)
        return linear_probes(on[0], train().labels[label], on[1], len(spec.labels[label]))

    @functools.cache
    def simple(label: str) -> dict[str, LogProbability]:
        on_train, on_test = plain()
        return baselines(
            on_train, train().labels[label], on_test, config.baselines, experiment.inputs.columns,
            len(spec.labels[label]), experiment.seed, told=label in spec.label_texts,
        )  # fmt: skip

    def fitted(label: str, denied: View) -> dict[str, LogProbability]:
        found = {view_name(view, PROBE): of for view, of in probed(label, PROBE).items() if view >= denied}
        before = probed(label, UNTRAINED + PROBE)
        if denied in before:
            found[view_name(denied, UNTRAINED + PROBE)] = before[denied]
        return found | simple(label)

    @functools.cache
    def readings() -> list[list[Words]]:
        return [samples.readings(int(row))[: config.max_texts] for row in test.rows]

    @functools.cache
    def training_texts() -> list[Words]:
        return [words for row in drawn_rows(store, TRAIN, CONTEXTS) for words in samples.readings(int(row))]

    bootstrap = Bootstrap(config.bootstrap, experiment.seed)
    texts = OfTexts(learner, spec, trained.tokenizer, config.batch_size)

    def seen_by(task: str) -> HeldOut:
        return HeldOut(
            test=test,
            predicted=test.predicted.get(task, {}),
            all_texts=test.all_texts.get(task, {}),
            validation=validation,
            task=task,
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
            training_texts=training_texts,
            picture=functools.partial(middle_slice, samples),
        )

    found = [(name, learner.tasks[name].measure(seen_by(name))) for name in experiment.tasks]
    if not any(config.needs().labels for config in experiment.tasks.values()):
        rest = set(spec.labels) - {label for _, of in found for label in of.answered}
        found += [(label, probes(label, spec.label_texts, seen_by(label))) for label in sorted(rest)]
    trained_probes, before = ({label: probed(label, of) for label in spec.labels} for of in (PROBE, UNTRAINED + PROBE))
    stated = frozenset(spec.label_texts)
    found.append(("origin", origin(trained_probes, before, spec.modalities, stated, seen_by(""))))
    findings = joined(found)
    if spec.labels and (on := len(train().rows)) < (held := len(store.rows(TRAIN))):
        told = f"Probes and baselines are fitted on {on} of {held} training studies (evaluate.fit_studies)."
        findings = replace(findings, notes=(*findings.notes, told))
    return Evaluation(findings, test)


def probes(label: str, label_texts: dict[str, str], held_out: HeldOut) -> Findings:
    """Linear probes of a label that no task learns, blind to texts where it was read out of one."""
    denied = frozenset({"text"} if label in label_texts else ())
    fitted = held_out.fitted(label, denied)
    return tell(label, label, fitted, held_out, headline=view_name(denied, PROBE))


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
        tuple(dict.fromkeys(said for _, findings in found for said in findings.headlines)),
    )


def check(config: EvaluateConfig, store: Studies) -> None:
    """Refuses an evaluation that asks for what the store lacks, before anything is computed."""
    for name, columns in config.baselines.items():
        if name in RESERVED:
            raise UserError(f"evaluate.baselines.{name}: is the name of a baseline that is always there; give another")
        for column in columns:
            if column not in store.schema.columns:
                held = ", ".join(store.schema.columns)
                raise UserError(f"evaluate.baselines.{name}: the store has no column {column}; it has {held}")


def brief(name: str) -> bool:
    """Whether a measure stands in the printed table: no gains, no view but of the trained model untold, and no part of
    a measure (a name of four)."""
    return (
        name.count("/") < 3
        and "_minus_" not in name
        and not ("_without_" in name and ("untrained_" in name or "told_" in name))
    )


def results_table(measures: dict[str, Measure]) -> RichTable:
    """Measures side by side with their intervals; a chance level stands in the row of what it is the chance of."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="Held-out patients")
    table.add_column("measure", overflow="fold")  # a narrow screen breaks names, never numbers
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
        table.add_row(plain(name), _short(m.value), interval, _short(level.value) if level else "", str(m.n))
    return table


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
