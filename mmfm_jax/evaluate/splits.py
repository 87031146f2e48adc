"""What the frozen model makes of a split: fused features and the predictions of its tasks."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int, Shaped

from mmfm_jax.data.batch import Batch, ImagePart, InputSpec, LabelPart, TablePart, TextPart
from mmfm_jax.data.feed.example import fill_texts
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.metrics.held_out import Split, View, Words, views_of
from mmfm_jax.tasks.base import Views
from mmfm_jax.train.learner import Learner


class Extract(Protocol):
    def __call__(self, batch: Batch, ask: bool, alone: bool = False) -> dict: ...


def extractor(learner: Learner, spec: InputSpec, untrained: Learner | None = None) -> Extract:
    """The function from a host batch to `fused`, `predicted` and `untrained` of its studies (see Split), on all local
    devices. `untrained`: the learner before its training; without it nothing is said of it. Beside the batch it is told
    whether tasks are asked, and whether they alone are.

    The number of studies of a batch must be a multiple of the number of local devices.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    everywhere, by_study = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    graph, state = nnx.split(learner)
    state = jax.device_put(state, everywhere)
    before = jax.device_put(nnx.split(untrained)[1], everywhere) if untrained is not None else None
    views = views_of(spec.modalities)

    def fused(seen: Views) -> list:
        return [seen.fused(view).astype(jnp.float32).mean(axis=1) for view in views]

    def seen_by(state: nnx.State, batch: Batch) -> tuple[Learner, Views]:
        learner = nnx.merge(graph, state)
        return learner, Views(learner.model, prepare(batch, spec, None, None))

    @functools.partial(jax.jit, static_argnames="ask")
    def extract(state: nnx.State, batch: Batch, ask: bool) -> tuple[list, dict]:
        learner, seen = seen_by(state, batch)
        return fused(seen), {name: task.predict(seen) for name, task in learner.tasks.items() if ask}

    def run(batch: Batch, ask: bool, alone: bool = False) -> dict:
        given = jax.device_put(batch, by_study)
        if alone:
            return {"predicted": jax.device_get(extract(state, given, ask=True)[1])}
        found, predicted = jax.device_get(extract(state, given, ask=ask))
        unlearnt = jax.device_get(extract(before, given, ask=False)[0]) if before is not None else []
        return {"fused": dict(zip(views, found)), "predicted": predicted, "untrained": dict(zip(views, unlearnt))}

    return run


class Further(Protocol):
    """See AllTexts."""

    counts_first: bool

    def __call__(self, batch: Batch) -> Iterable[tuple[dict[str, TextPart], Int[np.ndarray, "batch"]]]: ...


def collect(
    extract: Extract,
    batches: Iterable[Batch],
    patients: Callable,
    ask: bool = True,
    further: Further | None = None,
) -> Split:
    """Runs `extract` over a split and joins its batches; `patients(rows)` gives the patient of each row.

    Unless tasks are asked, `predicted` and `same` are empty: they are for what tasks say of held-out studies. `further`
    (see AllTexts) gives the other texts of a batch, and how many each study has, for `all_texts`.
    """
    parts, rows, labels, contents, means, several = [], [], [], [], [], False
    for batch in batches:
        real = np.asarray(batch.study) >= 0  # the last batch is padded
        found = extract(batch, ask)
        parts.append(
            (
                *({view: x[real] for view, x in found[of].items()} for of in ("fused", "untrained")),
                jax.tree.map(operator.itemgetter(real), found["predicted"]),
            )
        )
        if ask and further is not None:
            asked = [
                (extract(replace(batch, texts=texts), True, True)["predicted"], held) for texts, held in further(batch)
            ]
            several = several or bool(asked)
            mean = _over_texts(found["predicted"], asked, further.counts_first)
            means.append(jax.tree.map(operator.itemgetter(real), mean))
        rows.append(batch.study[real])
        labels.append({k: np.where(part.present, part.value, -1)[real] for k, part in batch.labels.items()})
        contents.append({k: _digests(part, real) for k, part in _modalities(batch).items() if ask})
    return Split(
        rows=np.concatenate(rows),
        patients=np.asarray(patients(np.concatenate(rows))),
        labels=_concatenate(labels),
        fused=_by_view([fused for fused, *_ in parts]),
        predicted=_concatenate([predicted for *_, predicted in parts]),
        same={k: np.unique(v, return_inverse=True)[1] for k, v in _concatenate(contents).items()},
        untrained=_by_view([untrained for _, untrained, _ in parts]),
        all_texts=_concatenate(means) if several else {},
    )


def _over_texts(first, further: list[tuple[dict, Int[np.ndarray, "batch"]]], counts_first: bool):
    """The mean of what is predicted with the further texts of each study, each as often as it has texts, and with the
    first where that counts or there is nothing else. What is no measure (whole numbers, yes or no) stays that of the
    first."""

    def mean(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        if not np.issubdtype(first.dtype, np.floating):
            return first
        count = np.full((len(first), *[1] * (first.ndim - 1)), float(counts_first))
        total = first * count
        for other, (_, texts) in zip(others, further):
            held = texts.reshape(count.shape)
            total, count = total + np.where(held > 0, other * held.astype(float), 0), count + held
        return np.where(count > 0, total / np.maximum(count, 1), first).astype(first.dtype)

    return jax.tree.map(mean, first, *(predicted for predicted, _ in further))


def _by_view(parts: list[dict[View, np.ndarray]]) -> dict[View, np.ndarray]:
    return {view: np.concatenate([part[view] for part in parts]) for view in parts[0]}


def _concatenate(trees: list):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def _modalities(batch: Batch) -> dict:
    return {"image": (batch.images, batch.packed), "text": batch.texts, "table": batch.table}


def _digests(part, real: Bool[np.ndarray, "batch"]) -> Shaped[np.ndarray, "study"]:
    """A digest of each study's raw arrays of one modality: equal exactly when the model is given the same."""
    texts = jax.tree.map(lambda x: x.tokens if isinstance(x, TextPart) else x, part, is_leaf=_is_text)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(texts)]
    return np.array(
        [hashlib.sha256(b"".join(leaf[i].tobytes() for leaf in leaves)).hexdigest() for i in np.flatnonzero(real)]
    )


def _is_text(part) -> bool:
    return isinstance(part, TextPart)


# ---------------------------------------------------------------- texts alone


def text_parts(spec: InputSpec, tokenizer: Tokenizer, studies: Sequence[Sequence[Words]]) -> dict[str, TextPart]:
    """The text fields of studies that hold these words, the readings of each side by side; of no more of them than
    stand side by side."""
    parts = {}
    for field, length in spec.texts.items():
        part = TextPart(
            np.empty((len(studies), spec.text_tokens[field]), np.int32),
            np.empty(len(studies), bool),
            np.empty((len(studies), 2 * spec.text_tokens[field] // length), np.uint32),
            np.zeros((len(studies), length), np.int32) if field in spec.excerpts else None,
        )
        texts = [[(words[field], words[field]) for words in readings if field in words] for readings in studies]
        fill_texts(part, texts, length, tokenizer)
        parts[field] = part
    return parts


class AllTexts:
    """All texts of the studies of a batch, as many at once as stand side by side: those first drawn of every field,
    then the next, and so on. A field without any more shows its first."""

    def __init__(self, readings: Callable[[int], list[Words]], spec: InputSpec, tokenizer: Tokenizer, most: int):
        """`readings` gives the words of a row of the store, at most `most` of which are given."""
        self._readings, self._spec, self._tokenizer, self._most = readings, spec, tokenizer, most
        self.counts_first = not spec.readings
        """Whether the first text alone, which every batch holds, is one of the groups and is not given again."""

    def __call__(self, batch: Batch) -> Iterator[tuple[dict[str, TextPart], Int[np.ndarray, "batch"]]]:
        """The texts, and how many of them each study has."""
        readings = [self._readings(int(row))[: self._most] if row >= 0 else [] for row in np.asarray(batch.study)]
        if max(map(len, readings), default=0) < 2:
            return
        groups = [self._groups(of_study) for of_study in readings]
        for i in range(int(self.counts_first), max(map(len, groups))):
            group = [of_study[i] if i < len(of_study) else ([], 0) for of_study in groups]
            given = text_parts(self._spec, self._tokenizer, [words for words, _ in group])
            yield given, np.array([texts for _, texts in group])

    def _groups(self, readings: list[Words]) -> list[tuple[list[Words], int]]:
        """Readings to be given together, and how many texts of a field those are that no group before held."""
        held = {field: [words[field] for words in readings if field in words] for field in self._spec.texts}
        room = {field: self._spec.readings.get(field, 1) for field in held}
        groups = []
        for i in range(max((-(-len(texts) // room[field]) for field, texts in held.items()), default=0)):
            own = {field: texts[i * room[field] : (i + 1) * room[field]] for field, texts in held.items()}
            shown = {field: own[field] or texts[: room[field]] for field, texts in held.items()}
            most = max(map(len, shown.values()))
            words = [{field: texts[j] for field, texts in shown.items() if j < len(texts)} for j in range(most)]
            groups.append((words, max(map(len, own.values()))))
        return groups


class OfTexts:
    """What a task predicts of studies that hold nothing but texts."""

    def __init__(self, learner: Learner, spec: InputSpec, tokenizer: Tokenizer, batch: int):
        """`batch`: studies at a time."""
        self._spec, self._tokenizer, self._batch = spec, tokenizer, batch
        self._graph, self._state = nnx.split(learner)
        self._compiled: dict[tuple[str, tuple[str, ...]], Callable] = {}

    def tokens(self, words: Sequence[Words]) -> Shaped[np.ndarray, "study token"]:
        parts = text_parts(self._spec, self._tokenizer, [[of_study] for of_study in words])
        return np.concatenate([part.tokens for part in parts.values()], axis=1)

    def __call__(self, task: str, words: Sequence[Words], names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The predictions of these names, of studies with these words."""
        predict = self._compiled.setdefault((task, names), self._predict(task, names))
        parts = []
        for start in range(0, len(words), self._batch):
            chunk = [[of_study] for of_study in words[start : start + self._batch]]
            filled = [*chunk, *[[]] * (self._batch - len(chunk))]  # one shape
            texts = text_parts(self._spec, self._tokenizer, filled)
            found = jax.device_get(predict(self._state, texts))
            parts.append({name: np.asarray(x, np.float32)[: len(chunk)] for name, x in found.items()})
        return _concatenate(parts)

    def _predict(self, task: str, names: tuple[str, ...]) -> Callable:
        @jax.jit
        def predict(state: nnx.State, texts: dict[str, TextPart]) -> dict:
            learner = nnx.merge(self._graph, state)
            batch = prepare(_only_texts(self._spec, texts), self._spec, None, None)
            found = learner.tasks[task].predict(Views(learner.model, batch))
            return {name: found[name] for name in names}

        return predict


def _only_texts(spec: InputSpec, texts: dict[str, TextPart]) -> Batch:
    """Traced inside jit, where what is absent and not asked for costs nothing."""
    n = len(next(iter(texts.values())).present)
    absent = jnp.zeros(n, bool)
    images = {
        role: ImagePart(
            jnp.zeros((n, *image.raw, image.raw_channels)),
            jnp.ones((n, 3)),
            absent,
            image.normalise and jnp.zeros((n, 2)),
        )
        for role, image in spec.images.items()
    }
    numbers, categories = (n, len(spec.numbers)), (n, len(spec.categories))
    table = TablePart(
        jnp.zeros(numbers), jnp.zeros(numbers, bool), jnp.zeros(categories, jnp.int32), jnp.zeros(categories, bool)
    )
    labels = {label: LabelPart(jnp.zeros(n, jnp.int32), absent) for label in spec.labels}
    return Batch(jnp.full(n, -1, jnp.int32), images, texts, table, labels)
