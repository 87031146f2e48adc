"""The page is complete in itself, escapes what it shows and names nobody."""

import json
import re
import xml.dom.minidom
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest

from mmfm_jax.data.inspect.slices import Slice, scale_bar_mm, scaled_slice
from mmfm_jax.evaluate import report
from mmfm_jax.evaluate.report import pieces
from mmfm_jax.metrics import label as label_module
from mmfm_jax.metrics.examples import Example, examples_html
from mmfm_jax.metrics.findings import Findings, Forest, Passage
from mmfm_jax.metrics.label import Predictions
from mmfm_jax.metrics.statistics import Measure

PATIENTS = np.array([f"secrethash{i}" for i in range(40)])


def findings(**changes):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 40)
    names = {"fused": np.log(rng.dirichlet([1, 1], 40))}
    told = label_module._exhibits(
        "disease",
        Predictions(("no", "yes"), label, PATIENTS, names, "fused"),
        {"disease/fused/auroc": Measure(0.9, 0.8, 0.95, 40)},
        None,
    )
    image = Slice(rng.random((8, 8, 1)), (2.0, 2.0))
    recall = {
        "retrieval/image_to_text/recall@5": Measure(0.5, 0.4, 0.6, 40),
        "retrieval/image_to_text/recall@5_chance": Measure(0.125, None, None, 40),
    }
    content = {
        "measures": {
            "disease/fused/auroc": Measure(0.9, 0.8, 0.95, 40),
            "disease/fused_minus_baseline_size/auroc": Measure(0.1, -0.1, 0.2, 40),
            **recall,
        },
        "exhibits": (
            Passage("Examples", "", examples_html([Example(image, "a <b>bold</b> claim", "another", 1.5)])),
            *told,
            Forest("Finding a study's partner", "", "recall", recall),
        ),
        "notes": ("margin is left out.",),
    }
    return Findings(**{**content, **changes})


def page(found=None, history=None):
    curves = {"loss": (np.arange(3), np.ones(3)), "validation/loss": (np.arange(3), np.ones(3))}
    return report.render("demo <run>", "Step 3.", found or findings(), curves if history is None else history)


class Tags(HTMLParser):
    """Checks that tags nest; collects image sources and links."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def parse(text):
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    return tags


def test_page_nests_and_holds_all_it_shows():
    tags = parse(page())
    assert len(tags.sources) == 6
    for source in tags.sources:
        kind, content = source.split(",")
        assert kind == "data:image/svg+xml;base64"
        xml.dom.minidom.parseString(b64decode(content))
    assert tags.headings == [
        "Telling one class from another", "Finding a study's partner", "ROC curves", "Calibration", "Examples",
        "Training", "All measures",
    ]  # fmt: skip


def test_page_escapes_texts_and_names_no_patient():
    text = page()
    assert "<b>bold" not in text and "a &lt;b&gt;bold&lt;/b&gt; claim" in text and "demo &lt;run&gt;" in text
    everything = text + "".join(b64decode(s.split(",")[1]).decode() for s in parse(text).sources)
    assert "secrethash" not in everything and "0.800 to 0.950" in text


def test_sections_with_nothing_to_show_are_left_out():
    tags = parse(page(Findings(), {}))
    assert tags.headings == ["All measures"] and tags.sources == []


def test_what_several_tasks_put_under_one_heading_stands_together():
    forest = [Forest("One", "said once", "AUROC", {name: Measure(0.5, 0.4, 0.6, 9)}) for name in ("a", "b")]
    drawn = pieces([*forest, Passage("One", "", "<p>words</p>")])
    assert len(drawn) == 2 and drawn[1] == "<p>words</p>"
    text = page(Findings(exhibits=(*forest, Forest("Two", "", "AUROC", {"c": Measure(0.5, 0.4, 0.6, 9)}))), {})
    assert parse(text).headings == ["One", "Two", "All measures"] and text.count("said once") == 1


def test_the_same_results_give_the_same_page():
    assert page() == page()


def test_history_survives_a_cut_line_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "time": "t", "loss": 3.0},
        {"step": 2, "time": "t", "loss": 2.0, "validation/loss": 4.0},
        {"step": 2, "time": "t", "loss": 2.5},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    history = report.read_history(path)
    assert set(history) == {"loss", "validation/loss"}
    assert [v.tolist() for v in history["loss"]] == [[1, 2], [3.0, 2.5]]
    assert [v.tolist() for v in history["validation/loss"]] == [[2], [4.0]]
    assert report.read_history(tmp_path / "none") == {}


@pytest.mark.parametrize("extent, bar", [(30, 10), (60, 20), (64, 20), (14, 2), (300, 100), (5, 1), (0.9, 0.2)])
def test_scale_bar_is_round_and_at_most_a_third(extent, bar):
    assert scale_bar_mm(extent) == pytest.approx(bar)


def test_slices_of_one_frame_show_true_sizes_and_a_bar_of_true_length():
    """Read off the axes: a 10 mm slice covers half a 20 mm frame, and the bar has the length it states."""
    image = Slice(np.ones((5, 10, 1)), (2.0, 1.0))
    axes = scaled_slice(image, (20.0, 20.0)).axes[0]
    left, right, bottom, top = axes.images[0].get_extent()
    assert (right - left, bottom - top) == (10, 10)
    assert np.ptp(axes.get_xlim()) == 20 and np.ptp(axes.get_ylim()) == 20
    bar = np.asarray(axes.lines[0].get_xdata())
    stated = re.fullmatch(r"([\d.]+) mm", axes.texts[0].get_text())
    assert stated and bar[1] - bar[0] == pytest.approx(float(stated[1]))
