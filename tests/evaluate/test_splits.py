"""What the frozen model makes of a split, on a small model with untrained weights."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.data.batch import Batch, ImagePart, ImageShape, InputSpec, LabelPart, NumberStats, TablePart, TextPart
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.evaluate.splits import AllTexts, OfTexts, collect, extractor, text_parts
from mmfm_jax.experiment import validate
from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.held_out import HeldOut, views_of
from mmfm_jax.metrics.retrieval import Side
from mmfm_jax.train.learner import Learner

TOWER = {"width": 16, "depth": 1, "heads": 2}
EXPERIMENT = {
    "name": "tiny",
    "inputs": {
        "images": {"scan": {"size": [4, 4, 4], "patch": [2, 2, 2], "window": [0, 1]}},
        "texts": {"report": {"length": 16}},
        "columns": ["age"],
    },
    "data": {"store": "none"},
    "model": {"vision": TOWER, "text": TOWER, "table": TOWER, "fusion": TOWER | {"latents": 2}, "dtype": "float32"},
    "tasks": {
        "image_text": {"kind": "contrastive", "width": 8},
        "diagnosis": {"kind": "classification", "label": "disease"},
    },
    "train": {"steps": 1, "batch_size": 8},
}
STUDIES = 8


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a round nodule", "a lobed mass"], 300)


@pytest.fixture(scope="module")
def spec(tokenizer):
    return InputSpec(
        images={"scan": ImageShape(size=(4, 4, 4), patch=(2, 2, 2), channels=1, window=(0, 1))},
        texts={"report": 16},
        vocabulary_size=tokenizer.vocabulary_size,
        mask_token=tokenizer.mask_token,
        numbers={"age": NumberStats(mean=50, sd=10)},
        categories={},
        labels={"disease": ("no", "yes")},
    )


@pytest.fixture(scope="module")
def learner(spec):
    return Learner(validate(EXPERIMENT, "test"), spec, nnx.Rngs(0))


@pytest.fixture(scope="module")
def extract(learner, spec):
    return extractor(learner, spec)


def batch(tokenizer, real=STUDIES):
    """Studies with every part; those after `real` pad the batch."""
    rng = np.random.default_rng(0)
    tokens = np.stack([tokenizer.encode(text, 16) for text in ("a round nodule", "a lobed mass") * (STUDIES // 2)])
    return Batch(
        study=np.where(np.arange(STUDIES) < real, 10 + np.arange(STUDIES), -1),
        images={
            "scan": ImagePart(
                rng.random((STUDIES, 4, 4, 4, 1), np.float32), np.ones((STUDIES, 3), np.float32), np.ones(STUDIES, bool)
            )
        },
        texts={"report": TextPart(tokens, np.ones(STUDIES, bool), np.zeros((STUDIES, 2), np.uint32))},
        table=TablePart(
            rng.normal(50, 10, (STUDIES, 1)).astype(np.float32),
            np.ones((STUDIES, 1), bool),
            np.zeros((STUDIES, 0), np.int32),
            np.zeros((STUDIES, 0), bool),
        ),
        labels={"disease": LabelPart(np.arange(STUDIES) % 2, np.arange(STUDIES) > 0)},
    )


def names(rows):
    return np.array([f"p{row}" for row in rows])


def test_a_view_without_a_modality_is_the_view_of_studies_that_lack_it(extract, tokenizer):
    whole = batch(tokenizer)
    text = whole.texts["report"]
    lacking = dataclasses.replace(
        whole, texts={"report": TextPart(np.zeros_like(text.tokens), np.zeros(STUDIES, bool), text.digest)}
    )
    seen, without = collect(extract, [whole], names), collect(extract, [lacking], names)
    blind = frozenset({"text"})
    np.testing.assert_allclose(seen.fused[blind], without.fused[frozenset()], atol=1e-5)
    head, other = seen.predicted["diagnosis"], without.predicted["diagnosis"]
    np.testing.assert_allclose(head["fused_without_text"], other["fused"], atol=1e-5)
    assert np.abs(seen.fused[frozenset()] - without.fused[frozenset()]).max() > 1e-3
    assert not without.predicted["image_text"]["text_present"].any()


def test_a_view_is_every_set_of_modalities_that_leaves_one():
    every = ("image", "text", "table")
    views = [frozenset(left_out) for n in range(3) for left_out in itertools.combinations(every, n)]
    assert list(views_of(every)) == views
    assert set(views_of(every, frozenset({"text"}))) == {view for view in views if "text" in view}
    assert views_of(("text",)) == (frozenset(),)


def test_untrained_features_are_those_of_the_other_learner(learner, spec, tokenizer):
    other = Learner(validate(EXPERIMENT, "test"), spec, nnx.Rngs(7))
    both = collect(extractor(learner, spec, other), [batch(tokenizer)], names)
    alone = collect(extractor(other, spec), [batch(tokenizer)], names)
    assert not alone.untrained and both.untrained.keys() == both.fused.keys()
    for view, features in both.untrained.items():
        np.testing.assert_allclose(features, alone.fused[view], atol=1e-5)
        assert np.abs(features - both.fused[view]).max() > 1e-3


def test_padding_is_dropped_and_batches_join_in_order(extract, tokenizer):
    whole, part = batch(tokenizer), batch(tokenizer, real=3)
    joined = collect(extract, [whole, part], names)
    alone = collect(extract, [whole], names)
    assert joined.rows.tolist() == [*range(10, 18), 10, 11, 12]
    assert joined.patients[-1] == "p12"
    assert joined.labels["disease"].tolist() == [-1, 1, 0, 1, 0, 1, 0, 1, -1, 1, 0]
    whole_view = frozenset()
    np.testing.assert_allclose(joined.fused[whole_view], alone.fused[whole_view][[*range(8), 0, 1, 2]], atol=1e-5)
    np.testing.assert_allclose(np.exp(joined.predicted["diagnosis"]["fused"]).sum(axis=1), 1, atol=1e-5)


def test_of_what_is_only_fitted_on_tasks_are_not_asked_and_inputs_not_compared(learner, spec, extract, tokenizer):
    whole, asked = collect(extract, [batch(tokenizer)], names), []
    with pytest.MonkeyPatch.context() as patch:
        for task in learner.tasks.values():
            patch.setattr(type(task), "predict", lambda self, views: asked.append(self) or {})
        fitted = collect(extractor(learner, spec), [batch(tokenizer)], names, ask=False)
    assert not asked and not fitted.predicted and not fitted.same
    for view, fused in whole.fused.items():
        np.testing.assert_allclose(fitted.fused[view], fused, atol=1e-5)


def test_studies_are_the_same_in_a_modality_exactly_when_its_inputs_are_equal(extract, tokenizer):
    found = collect(extract, [batch(tokenizer)], names)
    assert found.same["text"].tolist() == [found.same["text"][i % 2] for i in range(STUDIES)]
    assert len(set(found.same["text"])) == 2 and len(set(found.same["image"])) == STUDIES


def test_a_prompt_is_embedded_as_a_report_in_the_same_words(learner, spec, extract, tokenizer):
    texts = collect(extract, [batch(tokenizer)], names).predicted["image_text"]["text"]
    words = [{"report": "a lobed mass"}, {"report": "a round nodule"}]
    embed = OfTexts(learner, spec, tokenizer, 3)
    prompts = embed("image_text", words, ("text",))["text"]
    np.testing.assert_array_equal(embed.tokens(words)[::-1], batch(tokenizer).texts["report"].tokens[:2])
    np.testing.assert_allclose(prompts, texts[[1, 0]], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(prompts, axis=1), 1, atol=1e-5)


def test_features_do_not_depend_on_the_number_of_devices(learner, spec, extract, tokenizer, monkeypatch):
    assert jax.local_device_count() > 1
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    one = extractor(learner, spec)
    monkeypatch.undo()
    for a, b in zip(jax.tree.leaves(one(batch(tokenizer), True)), jax.tree.leaves(extract(batch(tokenizer), True))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def further(spec, tokenizer, readings, most=8):
    return AllTexts(lambda row: readings[row - 10], spec, tokenizer, most)


def held_out(learner, spec, tokenizer, seen, readings) -> HeldOut:
    """The evaluation that the contrastive task sees; nothing is fitted and no picture is taken."""

    def nothing(*_):
        raise AssertionError("not to be asked")

    of_texts = OfTexts(learner, spec, tokenizer, 5)  # 12 readings: batches are cut anywhere
    return HeldOut(
        seen, seen.predicted["image_text"], seen.all_texts.get("image_text", {}), nothing, "image_text", spec.labels,
        Bootstrap(10, 0), 0, "test", (1,), 9, nothing,
        functools.partial(of_texts, "image_text"), of_texts.tokens, "report", lambda: readings, list, nothing,
    )  # fmt: skip


def text_side(learner, spec, tokenizer, seen, readings) -> Side:
    """The texts that the contrastive task compares."""
    predicted, present = (seen.predicted["image_text"][name] for name in ("text", "text_present"))
    side = Side(predicted, present, seen.same["text"])
    return learner.tasks["image_text"]._whole_texts(side, held_out(learner, spec, tokenizer, seen, readings))


def test_the_text_of_a_study_is_the_mean_of_its_readings(learner, spec, extract, tokenizer):
    round_, lobed = ({"report": text} for text in ("a round nodule", "a lobed mass"))
    readings = [[round_], [lobed], [round_, lobed], [lobed, round_], [round_, lobed, lobed], [lobed] * 2, [round_], []]
    seen = collect(extract, [batch(tokenizer)], names, further=further(spec, tokenizer, readings))
    found = text_side(learner, spec, tokenizer, seen, readings)
    one, other = OfTexts(learner, spec, tokenizer, 2)("image_text", [round_, lobed], ("text",))["text"]
    sums = [one, other, one + other, one + other, 2 * other + one]
    expected = np.stack([total / np.linalg.norm(total) for total in sums])
    np.testing.assert_allclose(found.vectors[:5], expected, atol=1e-5)
    alike = found.same
    assert alike[2] == alike[3] and alike[0] == alike[6] and len(set(alike)) == 6


def test_a_head_is_given_all_texts_of_a_study_one_after_the_other(spec, extract, tokenizer):
    """Study 0 has two texts, study 1 has three, of which two are asked for, the others have one."""
    round_, lobed = ({"report": text} for text in ("a round nodule", "a lobed mass"))
    readings = [[round_, lobed], [lobed, lobed, round_]] + [[round_], [lobed]] * 3
    found = collect(extract, [batch(tokenizer)], names, further=further(spec, tokenizer, readings, most=2))
    other = batch(tokenizer)
    swapped = collect(extract, [dataclasses.replace(other, texts=text_parts(spec, tokenizer, [[lobed]] * 8))], names)
    for view, first in found.predicted["diagnosis"].items():
        expected = np.array(first)
        expected[:2] = (first[:2] + swapped.predicted["diagnosis"][view][:2]) / 2
        np.testing.assert_allclose(found.all_texts["diagnosis"][view], expected, atol=1e-5)
        assert (np.abs(expected - first).max() > 1e-4) == ("text" not in view)
    present = found.all_texts["image_text"]["text_present"]
    assert present.dtype == bool and present.all()
    alone = further(spec, tokenizer, readings, most=1)
    assert not collect(extract, [batch(tokenizer)], names, further=alone).all_texts


def test_all_texts_are_given_as_many_at_once_as_stand_side_by_side(spec, tokenizer):
    """Each group counts as often as it holds texts, and the first text alone only where there is no other."""
    together = spec.model_copy(update={"readings": {"report": 2}})
    extract = extractor(Learner(validate(EXPERIMENT, "test"), together, nnx.Rngs(0)), together)
    a, b, c = ({"report": text} for text in ("a round nodule", "a lobed mass", "a round mass"))
    readings = [[a], [b], [a, b], [b, a], [a, b, c], [c, b, a, a], [b], []]

    def given(groups) -> dict[str, np.ndarray]:
        texts = text_parts(together, tokenizer, groups)
        return extract(dataclasses.replace(batch(tokenizer), texts=texts), True)["predicted"]["diagnosis"]

    first = batch(tokenizer, 8)
    first = dataclasses.replace(first, texts=text_parts(together, tokenizer, [held[:1] for held in readings]))
    found = collect(extract, [first], names, further=further(together, tokenizer, readings))
    begin, rest = given([held[:2] for held in readings]), given([held[2:] for held in readings])
    alone = given([held[:1] for held in readings])
    swapped = given([held[1::-1] for held in readings])
    for view, got in found.all_texts["diagnosis"].items():
        expected = np.array(begin[view])
        expected[4] = (2 * begin[view][4] + rest[view][4]) / 3
        expected[5] = (begin[view][5] + rest[view][5]) / 2
        np.testing.assert_allclose(got, expected, atol=1e-5)
        np.testing.assert_allclose(found.predicted["diagnosis"][view], alone[view], atol=1e-5)
        np.testing.assert_allclose(begin[view], swapped[view], atol=1e-5)  # a set, not a sequence
        assert (np.abs(begin[view][2] - alone[view][2]).max() > 1e-4) == ("text" not in view)
    three = further(together, tokenizer, readings, most=3)(first)
    assert [counts.tolist() for _, counts in three] == [[1, 1, 2, 2, 2, 2, 1, 0], [0, 0, 0, 0, 1, 1, 0, 0]]


def test_a_field_without_further_texts_shows_its_first_beside_those_of_another(spec, tokenizer):
    both = spec.model_copy(update={"texts": {"report": 16, "history": 8}, "readings": {"report": 2}})
    words = {"report": ("a round nodule", "a lobed mass", "a mass"), "history": ("a nodule", "a lobed nodule")}
    readings = [{f: of[i] for f, of in words.items() if i < len(of)} for i in range(3)]
    groups = list(AllTexts(lambda row: readings, both, tokenizer, 8)(batch(tokenizer, 1)))

    def tokens(field: str, length: int, *texts: int) -> list[int]:
        return np.concatenate([tokenizer.encode(words[field][i], length) for i in texts]).tolist()

    report, history = ([texts[field].tokens[0].tolist() for texts, _ in groups] for field in ("report", "history"))
    assert report == [tokens("report", 16, 0, 1), tokens("report", 16, 2) + [0] * 16]
    assert history == [tokens("history", 8, 0), tokens("history", 8, 1)]
    assert [counts[0] for _, counts in groups] == [2, 1]


def test_studies_of_one_reading_each_are_left_as_they_are(learner, spec, extract, tokenizer):
    seen = collect(extract, [batch(tokenizer)], names)
    found = text_side(learner, spec, tokenizer, seen, [[{"report": "a"}]] * STUDIES)
    assert found.vectors is seen.predicted["image_text"]["text"]
