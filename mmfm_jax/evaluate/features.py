"""What the frozen model makes of a split: fused features, class probabilities and contrastive embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Shaped

from mmfm_jax.data.batch import PAD, Batch, ImagePart, InputSpec, LabelPart, TablePart, TextPart
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.tasks.base import Views
from mmfm_jax.tasks.classification import Classification
from mmfm_jax.tasks.contrastive import Contrastive
from mmfm_jax.train.learner import Learner

FUSED = "fused"


@dataclass(frozen=True)
class Embedding:
    """Unit vectors of one modality in the space of a contrastive task; meaningless where not present."""

    vectors: Float[np.ndarray, "study width"]
    present: Bool[np.ndarray, "study"]


@dataclass(frozen=True)
class Features:
    """The studies of a split, in one order, as the model sees them. A view is `fused` or `fused_without_MODALITY`."""

    rows: Int[np.ndarray, "study"]
    """Of the store."""
    patients: Shaped[np.ndarray, "study"]
    labels: dict[str, Int[np.ndarray, "study"]]
    """Index into the label's classes, -1 where the study has none."""
    fused: dict[str, Float[np.ndarray, "study width"]]
    """By view: mean over the fusion's latents."""
    heads: dict[str, dict[str, Float[np.ndarray, "study label_class"]]]
    """By label, then view: log-probabilities of the label's classification head."""
    embeddings: dict[str, dict[str, Embedding]]
    """By contrastive task, then modality."""
    same: dict[str, Int[np.ndarray, "study"]]
    """By modality: studies whose inputs are identical share a number."""


def views_of(modalities: tuple[str, ...]) -> dict[str, str | None]:
    """Each view of the fusion and the modality it leaves out; a model of one modality has only the whole view."""
    without = {f"{FUSED}_without_{modality}": modality for modality in modalities}
    return {FUSED: None, **(without if len(modalities) > 1 else {})}


def extractor(learner: Learner, spec: InputSpec) -> Callable[[Batch], dict]:
    """The function from a host batch to `fused`, `heads` and `embeddings` of its studies, on all local devices.

    The number of studies of a batch must be a multiple of the number of local devices.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    graph, state = nnx.split(learner)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    views = views_of(spec.modalities)

    @jax.jit
    def extract(state: nnx.State, batch: Batch) -> dict:
        learner = nnx.merge(graph, state)
        seen = Views(learner.model, prepare(batch, spec, None, None), jax.random.key(0), train=False)
        latents = {view: _latents(seen, without, spec.modalities) for view, without in views.items()}
        heads = {t.config.label: t for t in learner.tasks.values() if isinstance(t, Classification)}
        return {
            "fused": {view: x.astype(jnp.float32).mean(axis=1) for view, x in latents.items()},
            "heads": {
                label: {view: jax.nn.log_softmax(head.logits(x).astype(jnp.float32)) for view, x in latents.items()}
                for label, head in heads.items()
            },
            "embeddings": {
                name: {modality: tuple(pair) for modality, pair in task.embed(seen).items()}
                for name, task in learner.tasks.items()
                if isinstance(task, Contrastive)
            },
        }

    by_study = NamedSharding(mesh, PartitionSpec("data"))
    return lambda batch: jax.device_get(extract(state, jax.device_put(batch, by_study)))


def _latents(seen: Views, without: str | None, modalities: tuple[str, ...]):
    """Latents [study, latent, width] of the fusion, blind to one modality or to none."""
    if without is None:
        return seen.latents
    studies = seen.batch.study.shape[0]
    keep = {modality: jnp.full(studies, modality != without) for modality in modalities}
    return seen.model.fuse(seen.encoded, keep)


def collect(extract: Callable[[Batch], dict], batches: Iterable[Batch], patients: Callable) -> Features:
    """Runs `extract` over a split and joins its batches; `patients(rows)` gives the patient of each row."""
    parts, rows, labels, contents = [], [], [], []
    for batch in batches:
        real = np.asarray(batch.study) >= 0  # the last batch is padded
        parts.append(jax.tree.map(operator.itemgetter(real), extract(batch)))
        rows.append(batch.study[real])
        labels.append({k: np.where(part.present, part.value, -1)[real] for k, part in batch.labels.items()})
        contents.append({k: _digests(part, real) for k, part in _modalities(batch).items()})
    joined = _concatenate(parts)
    embeddings = {
        task: {modality: Embedding(*pair) for modality, pair in both.items()}
        for task, both in joined["embeddings"].items()
    }
    return Features(
        rows=np.concatenate(rows),
        patients=np.asarray(patients(np.concatenate(rows))),
        labels=_concatenate(labels),
        fused=joined["fused"],
        heads=joined["heads"],
        embeddings=embeddings,
        same={k: np.unique(v, return_inverse=True)[1] for k, v in _concatenate(contents).items()},
    )


def _concatenate(trees: list):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def _modalities(batch: Batch) -> dict:
    return {"image": (batch.images, batch.packed), "text": batch.texts, "table": batch.table}


def _digests(part, real: Bool[np.ndarray, "batch"]) -> Shaped[np.ndarray, "study"]:
    """A digest of each study's raw arrays of one modality: equal exactly when the model is given the same."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(part)]
    return np.array(
        [hashlib.sha256(b"".join(leaf[i].tobytes() for leaf in leaves)).hexdigest() for i in np.flatnonzero(real)]
    )


# ---------------------------------------------------------------- texts alone

Words = dict[str, str]  # by text field


def embed_prompts(
    learner: Learner, spec: InputSpec, tokenizer: Tokenizer, task: str, prompts: tuple[str, ...]
) -> Float[np.ndarray, "prompt width"]:
    """Unit vectors of sentences, each as the only content of a study: its first text field."""
    field = next(iter(spec.texts))
    texts = text_parts(spec, tokenizer, [{field: prompt} for prompt in prompts])
    return text_embedder(learner, spec)(texts)[task]


def average_readings(
    test: Features, learner: Learner, spec: InputSpec, tokenizer: Tokenizer, readings: list[list[Words]], batch: int
) -> Features:
    """`test` with the text embedding of each study that holds several texts made the mean of theirs, a unit vector.

    `readings`: those of each study, one dictionary for the first text of every field, one for the second, and so on.
    As prompts are averaged in CLIP (arXiv:2103.00020): one reader's words say less of a study than all readers' do.
    """
    tasks = [task for task, sides in test.embeddings.items() if "text" in sides]
    if not tasks or max(map(len, readings), default=0) < 2:
        return test
    study = np.repeat(np.arange(len(readings)), [len(of_study) for of_study in readings])
    words = [reading for of_study in readings for reading in of_study]
    embed, parts, digests = text_embedder(learner, spec), [], []
    for start in range(0, len(words), batch):
        chunk = words[start : start + batch]
        texts = text_parts(spec, tokenizer, chunk + [{}] * (batch - len(chunk)))  # one shape, compiled once
        parts.append({task: vectors[: len(chunk)] for task, vectors in embed(texts).items() if task in tasks})
        digests.extend(_digests(texts, np.arange(batch) < len(chunk)))
    vectors, embeddings = _concatenate(parts), dict(test.embeddings)
    for task in tasks:
        total = np.zeros((len(readings), vectors[task].shape[1]))
        np.add.at(total, study, vectors[task])
        mean = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        text = dataclasses.replace(test.embeddings[task]["text"], vectors=mean.astype(np.float32))
        embeddings[task] = test.embeddings[task] | {"text": text}
    held = [[] for _ in readings]
    for i, digest in zip(study, digests):
        held[i].append(str(digest))
    alike = np.unique([" ".join(sorted(of_study)) for of_study in held], return_inverse=True)[1]
    return dataclasses.replace(test, embeddings=embeddings, same=test.same | {"text": alike})


def text_parts(spec: InputSpec, tokenizer: Tokenizer, words: list[Words]) -> dict[str, TextPart]:
    """The text fields of studies that hold these words."""
    parts = {}
    for field, length in spec.texts.items():
        tokens = np.full((len(words), length), PAD, np.int32)
        for i, of_study in enumerate(words):
            if field in of_study:
                tokens[i] = tokenizer.encode(of_study[field], length)
        parts[field] = TextPart(tokens, (tokens != PAD).any(axis=1))
    return parts


def text_embedder(
    learner: Learner, spec: InputSpec
) -> Callable[[dict[str, TextPart]], dict[str, Float[np.ndarray, "study width"]]]:
    """The function from texts to the unit vectors of studies that hold nothing else, by contrastive task."""
    graph, state = nnx.split(learner)

    @jax.jit
    def embed(state: nnx.State, texts: dict[str, TextPart]) -> dict:
        learner = nnx.merge(graph, state)
        batch = _only_texts(spec, texts)
        seen = Views(learner.model, prepare(batch, spec, None, None), jax.random.key(0), train=False)
        return {
            name: task.embed(seen)["text"][0]
            for name, task in learner.tasks.items()
            if isinstance(task, Contrastive) and "text" in task.config.between
        }

    return lambda texts: jax.tree.map(lambda x: np.asarray(x, np.float32), embed(state, texts))


def _only_texts(spec: InputSpec, texts: dict[str, TextPart]) -> Batch:
    """Traced inside jit, where what is absent costs nothing."""
    n = len(next(iter(texts.values())).present)
    absent = jnp.zeros(n, bool)
    images = {
        role: ImagePart(jnp.zeros((n, *image.size, image.channels)), jnp.ones((n, 3)), absent)
        for role, image in spec.images.items()
    }
    numbers, categories = (n, len(spec.numbers)), (n, len(spec.categories))
    table = TablePart(
        jnp.zeros(numbers), jnp.zeros(numbers, bool), jnp.zeros(categories, jnp.int32), jnp.zeros(categories, bool)
    )
    labels = {label: LabelPart(jnp.zeros(n, jnp.int32), absent) for label in spec.labels}
    return Batch(jnp.full(n, -1, jnp.int32), images, texts, table, labels)
