"""The whole evaluation of an untrained model on a small store made here."""

import dataclasses
import io
import json

import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, Schema, Study
from mmfm_jax.errors import UserError
from mmfm_jax.evaluate import evaluate as module
from mmfm_jax.evaluate.plain import read_plain
from mmfm_jax.experiment import validate
from mmfm_jax.metrics import baselines as fitting
from mmfm_jax.metrics.statistics import Measure, chance, measure
from mmfm_jax.train.checkpoint import TrainedRun
from mmfm_jax.train.learner import Learner

SCHEMA = Schema(
    images={"scan": ImageSpec(dtype="uint8", shape=(4, 4, 4))},
    texts={"report": "what was seen"},
    columns={
        "diameter_mm": ColumnSpec(kind="number", unit="mm"),
        "contrast": ColumnSpec(kind="category", vocabulary=("no", "yes")),
    },
    labels={
        "malignancy": LabelSpec(classes=("benign", "malignant")),
        "spiculation": LabelSpec(classes=("no", "yes")),
        "lobe": LabelSpec(classes=("upper", "middle", "lower")),
    },
)
STUDIES = 120
TOWER = {"width": 8, "depth": 1, "heads": 1}
EXPERIMENT = {
    "name": "tiny",
    "inputs": {
        "images": {"scan": {"size": [4, 4, 4], "patch": [4, 4, 4], "window": [0, 255]}},
        "texts": {"report": {"length": 24}},
        "columns": ["diameter_mm", "contrast"],
    },
    "model": {"vision": TOWER, "text": TOWER, "table": TOWER, "fusion": TOWER | {"latents": 2}, "dtype": "float32"},
    "tasks": {
        "image_text": {
            "kind": "contrastive",
            "width": 8,
            "zero_shot": {
                "spiculation": {"label": "spiculation", "positive": ["spicules"], "negative": ["smooth"]},
            },
        },
        "again": {"kind": "contrastive", "width": 8, "loss": "softmax"},
        "image_table": {"kind": "contrastive", "between": ["image", "table"], "width": 8},
        "diagnosis": {"kind": "classification", "label": "malignancy"},
        "place": {"kind": "classification", "label": "lobe"},  # which no study carries
    },
    "train": {"steps": 1, "batch_size": 8},
    "evaluate": {
        "bootstrap": 50,
        "batch_size": 32,
        "recall_at": [5],
        "max_gallery": 40,
        "baselines": {"diameter": ["diameter_mm"]},
    },
}


def study(number):
    rng = np.random.default_rng(number)
    malignant = int(rng.integers(2))
    parts = {
        "images": {"scan": Image(rng.integers(0, 256, (4, 4, 4, 1)).astype(np.uint8), (1.0, 1.0, 1.0))},
        "texts": {"report": (f"nodule {number % 40}",)},
        "row": {"diameter_mm": float(rng.normal(8 + 4 * malignant, 3)), "contrast": "yes"},
        "labels": {"malignancy": malignant, "spiculation": int(rng.integers(2))},
    }
    if number % 10 == 0:
        parts |= {"images": {}, "labels": {}}
    patient = number // 2
    return Study(patient=f"{patient:032x}", split="test" if patient % 2 else "train", **parts)


@pytest.fixture(scope="module", autouse=True)
def few_fits():
    """Cross-validation of one strength on two folds: which is chosen is tested with the baselines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "STRENGTHS", (1.0,))
        patch.setattr(fitting, "FOLDS", 2)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "store"
    write_store(str(folder), SCHEMA, (study(number) for number in range(STUDIES)))
    return StudyStore.open(str(folder))


@pytest.fixture(scope="module")
def trained(store):
    experiment = validate(EXPERIMENT | {"data": {"store": store.url}}, "test")
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), 300)
    spec = make_spec(experiment.inputs, store.schema, store.stats, tokenizer)
    return TrainedRun(experiment, spec, tokenizer, 1, Learner(experiment, spec, nnx.Rngs(0)))


def silent(file=None):
    return Console(file=file or io.StringIO(), width=200)


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run's folder after `mmfm evaluate`, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_run", lambda path: trained)
        result = module.evaluate(folder, silent(printed))
    return folder, result, printed.getvalue()


def test_evaluation_json_maps_every_name_to_value_interval_and_count(run):
    folder, _, _ = run
    measures = json.loads((folder / "evaluation.json").read_text())
    assert all(set(measure) == {"value", "low", "high", "n"} for measure in measures.values())
    blind = [f"_without_{m}" for m in ("image", "text", "table", "image_text", "image_table", "table_text")]
    baselines = ("diameter", "table", "sentences", "words", "sentences_and_table", "words_and_table", "image")
    ways = [f"{a}_to_{b}" for a, b in (("image", "text"), ("text", "image"), ("image", "table"), ("table", "image"))]
    ways_of_table = [f"retrieval/{way}" for way in ways[2:]]
    assert set(measures) == {
        *(
            f"malignancy/{kind}{view}/auroc"
            for kind in ("fused", "linear_probe", "untrained_linear_probe")
            for view in ("", *blind)
        ),
        *(f"malignancy/{front}baseline_{name}/auroc" for name in baselines for front in ("", "fused_minus_")),
        "malignancy/fused_minus_untrained_linear_probe/auroc",
        "malignancy/fused/calibration_error",
        "spiculation/zero_shot/auroc",
        *(f"spiculation/{front}baseline_{name}/auroc" for name in baselines for front in ("", "zero_shot_minus_")),
        *(
            f"spiculation/{kind}{view}/auroc"
            for kind in ("linear_probe", "untrained_linear_probe")
            for view in ("", *blind)
        ),
        *(
            f"{way}/{name}"
            for way in [*(f"{of}retrieval/{way}" for way in ways[:2] for of in ("", "again/")), *ways_of_table]
            for name in ("recall@5", "recall@5_chance", "median_rank", "median_rank_chance", "gallery_share")
        ),
    }
    assert measures["malignancy/fused/auroc"]["n"] == 54  # 60 test studies, of which every tenth is unlabelled


def test_baseline_is_fitted_on_the_training_patients_and_measured_on_the_test_patients(run, store):
    def split(name):
        rows = [store.table(int(row)) for row in store.rows(name)]
        known = [(values["diameter_mm"], labels["malignancy"]) for _, values, labels in rows if labels]
        return np.array([[x] for x, _ in known]), np.array([y for _, y in known])

    (x, y), (test_x, test_y) = split("train"), split("test")
    mean, sd = x.mean(axis=0), x.std(axis=0)
    log_odds = LogisticRegression().fit((x - mean) / sd, y).decision_function((test_x - mean) / sd)
    auroc = run[1].findings.measures["malignancy/baseline_diameter/auroc"]
    assert auroc.value == pytest.approx(roc_auc_score(test_y, log_odds))
    assert auroc.value > 0.7  # the diameter was made to tell


def test_report_stands_alone_and_names_no_patient_and_no_path(run, store):
    folder, _, printed = run
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and 'src="data:' in page and "http" not in page
    patients = set(store.patients(np.arange(len(store))))
    for text in (page, (folder / "evaluation.json").read_text(), printed):
        assert not any(patient in text for patient in patients) and store.url not in text
    assert "nodule" not in (folder / "evaluation.json").read_text() + printed  # the word of every text
    assert "nodule" not in page.partition("<h2>Examples</h2>")[0]
    assert "malignancy/fused/auroc" in printed and "report.html" in printed and "Step 1. " in printed
    assert sorted(p.name for p in folder.iterdir()) == ["evaluation.json", "report.html"]


def test_training_studies_are_read_only_where_something_is_fitted_on_them(run, trained, store, monkeypatch):
    collected = []

    def collect(extract, batches, patients, ask, further):
        collected.append(ask)
        return run[1].test

    monkeypatch.setattr(module, "collect", collect)
    samples = Samples(store, trained.experiment.inputs, trained.spec, trained.tokenizer)
    module.measure_run(trained, store, samples, silent())
    assert collected == [True, False]  # tasks are asked of the test split alone
    tasks = {"image_table": EXPERIMENT["tasks"]["image_table"]}
    experiment = validate(EXPERIMENT | {"data": {"store": store.url}, "tasks": tasks}, "test")
    unlabelled = dataclasses.replace(
        trained, experiment=experiment, spec=trained.spec.model_copy(update={"labels": {}})
    )
    module.measure_run(unlabelled, store, samples, silent())
    assert collected[2:] == [True]


def test_a_narrow_screen_breaks_names_and_never_numbers():
    found = Measure(0.123, 0.101, 0.145, 1234)
    screen = io.StringIO()
    names = ("calcification/told_untrained_linear_probe_of_all/auroc", "r/auroc")
    Console(file=screen, width=80).print(module.results_table(dict.fromkeys(names, found)))
    printed = screen.getvalue()
    assert "…" not in printed and printed.count("0.123  0.101 to 0.145") == 2 and printed.count("1234") == 2


def asks(trained, **changes):
    """The run with another `evaluate` section."""
    asked = EXPERIMENT | {"data": {"store": "none"}, "evaluate": EXPERIMENT["evaluate"] | changes}
    return dataclasses.replace(trained, experiment=validate(asked, "test"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"split": "held_out"}, "held_out"),
        ({"baselines": {"age": ["age"]}}, "evaluate.baselines.age: the store has no column age"),
        (
            {"baselines": {"table": ["contrast"]}},
            "evaluate.baselines.table: is the name of a baseline that is always there",
        ),
    ],
)
def test_what_the_run_or_its_store_lacks_is_named_in_one_sentence(trained, store, changes, message):
    asking = asks(trained, **changes)
    samples = Samples(store, trained.experiment.inputs, trained.spec, trained.tokenizer)
    with pytest.raises(UserError) as error:
        module.measure_run(asking, store, samples, silent())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_label_that_no_test_study_carries_is_left_out_with_a_note(run):
    _, result, printed = run
    findings = result.findings
    (note,) = (note for note in findings.notes if note.startswith("lobe is left out"))
    assert note in printed and not any(name.startswith("lobe/") for name in findings.measures)


def test_a_gallery_that_was_drawn_says_so_wherever_its_recall_stands(run):
    folder, result, printed = run
    drawn = "40 studies, drawn by a hash of patients from 54"
    assert [drawn in note for note in result.findings.notes] == [True, True, False]  # image and text, image and table
    page = (folder / "report.html").read_text()
    assert printed.count(drawn) == 2 and page.count(drawn) == 4  # above all, and beside the figure
    recall = next(line for line in printed.splitlines() if "retrieval/image_to_text/recall@5" in line)
    assert recall.split()[-2:] == ["0.125", "40"]


def test_the_printed_table_puts_chance_beside_what_it_is_the_chance_of():
    found = measure(lambda w: w.mean(axis=1), np.arange(4), 10, seed=0)
    printed = io.StringIO()
    silent(printed).print(module.results_table({"r/recall@5": found, "r/recall@5_chance": chance(0.125, 4)}))
    lines = [line for line in printed.getvalue().splitlines() if "recall" in line]
    assert len(lines) == 1 and "1.000" in lines[0] and "0.125" in lines[0]


def test_labels_are_probed_where_no_task_learns_one_and_blind_to_the_text_that_states_them(trained, store):
    tasks = {"image_table": EXPERIMENT["tasks"]["image_table"]}
    experiment = validate(EXPERIMENT | {"data": {"store": store.url}, "tasks": tasks}, "test")
    spec = trained.spec.model_copy(update={"label_texts": {"spiculation": "report"}})
    run = dataclasses.replace(trained, experiment=experiment, spec=spec, learner=Learner(experiment, spec, nnx.Rngs(0)))
    samples = Samples(store, experiment.inputs, spec, trained.tokenizer)
    measures = module.measure_run(run, store, samples, silent()).findings.measures
    probes = {name for name in measures if "linear_probe" in name and name.endswith("/auroc") and "minus" not in name}
    views = ("_text", "_image_text", "_table_text")
    blind = ("", "_without_image", "_without_table", "_without_image_table", *(f"_without{view}" for view in views))
    kinds = ("linear_probe", "untrained_linear_probe")
    assert {name for name in probes if name.startswith("malignancy")} == {
        f"malignancy/{kind}{view}/auroc" for kind in kinds for view in blind
    }
    assert {name for name in probes if name.startswith("spiculation")} == {
        f"spiculation/{'' if 'text' in view else 'told_'}{kind}{view}/auroc" for kind in kinds for view in blind
    }
    assert "spiculation/linear_probe_without_text_minus_baseline_table/auroc" in measures
    assert "spiculation/linear_probe_without_text_minus_untrained_linear_probe_without_text/auroc" in measures
    assert "spiculation/told_sentences/auroc" in measures and "malignancy/baseline_sentences/auroc" in measures
    assert not any("minus_told" in name or "spiculation/baseline_sentences" in name for name in measures)


@pytest.mark.parametrize(("label", "ours"), [("malignancy", "fused"), ("spiculation", "zero_shot")])
def test_the_headline_names_the_strongest_baseline(run, label, ours):
    folder, result, printed = run
    measures = result.findings.measures
    baselines = {n.split("/")[1]: m for n, m in measures.items() if n.startswith(f"{label}/baseline_")}
    strongest = max(baselines, key=lambda name: baselines[name].value)
    (headline,) = (said for said in result.findings.headlines if said.startswith(f"{label}: AUROC of {ours}"))
    less = measures[f"{label}/{ours}_minus_{strongest}/auroc"]
    assert f"strongest baseline, {strongest.removeprefix('baseline_')}, {baselines[strongest].value:.3f}" in headline
    assert f"{less.value:.3f} ({less.low:.3f} to {less.high:.3f})" in headline
    page = (folder / "report.html").read_text()
    assert headline in page and "Where each label comes from" in page
    assert headline.split(";")[0][:40] in printed


def test_probes_and_baselines_are_fitted_on_no_more_studies_than_asked_and_that_is_told(trained, store, monkeypatch):
    asking = asks(trained, fit_studies=30, untrained=False)
    samples = Samples(store, trained.experiment.inputs, trained.spec, trained.tokenizer)
    monkeypatch.setattr(
        module,
        "read_plain",
        lambda samples, columns, train, test: seen.append(train.rows) or read_plain(samples, columns, train, test),
    )
    seen = []
    findings = module.measure_run(asking, store, samples, silent()).findings
    assert len(seen) == 1 and len(seen[0]) == 30 and set(seen[0]) < set(store.rows("train"))
    assert any("30 of 60 training studies" in note for note in findings.notes)
    assert not any("untrained" in name for name in findings.measures)
